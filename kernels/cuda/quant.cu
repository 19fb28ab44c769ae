#include "kernels/cuda/fake.cuh"
extern "C" int cq_cuda_fake_quant(cq_stream *s, const cq_fake_quant_args *a) {
    CQ_CUDA_F32("fake_quant", a);
    CQ_TRY(cq_fake_columns(a->fq, a->cols));
    cq_fake_job job = cq_fake_job_make(a->rows, a->cols, NULL, a->y, a->fq);
    job.block_amax = a->block_amax;
    job.top = a->top;
    cq_fake_launch(s, cq_fake_dense{(const float *)a->x, cq_aligned16(a->x)}, job);
    CQ_CUDA_END("fake_quant");
}
