/// tiled.cu - block scales in the order in which FP4 tensor cores read them.
///
/// Tiles of 128 rows and 4 scales, 512 bytes each, one tile of columns after the other within 128
/// rows; in a tile, scale c of row r is byte 16 (r mod 32) + 4 (r / 32) + c. Rows and columns
/// beyond the matrix are zeros. (cuBLASLt, CUBLASLT_MATMUL_MATRIX_SCALE_VEC16_UE4M3.)
///
/// Gate and up of a block of Qwen3-4B: 3.1 MB in and out, 2 us.
#include "kernels/cuda/tiled.cuh"

namespace {

enum { THREADS = 256 };

/// Four scales of a row a thread.
__global__ void __launch_bounds__(THREADS) tile(int64_t rows, int64_t cols, int64_t col_tiles,
                                                const uint8_t *scales, uint32_t *out, int64_t all) {
    int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= all)
        return;
    int64_t row = at / col_tiles, tile_of = at % col_tiles, r = row % 128;
    uint32_t word = 0;
    for (int c = 0; c < 4; c++) {
        int64_t col = 4 * tile_of + c;
        if (row < rows && col < cols)
            word |= (uint32_t)scales[row * cols + col] << (8 * c);
    }
    out[(row / 128 * col_tiles + tile_of) * 128 + r % 32 * 4 + r / 32] = word;
}

__global__ void factors(const float *a_amax, const float *b_amax, float b_top, float beta,
                        float *out) {
    if (threadIdx.x > 0)
        return;
    out[0] = cq_nvfp4_tensor_scale(*a_amax, 448.0f) * cq_nvfp4_tensor_scale(*b_amax, b_top);
    out[1] = beta;
}

} // namespace

extern "C" int cq_cuda_tile_scales(cq_stream *s, int64_t rows, int64_t cols, const uint8_t *scales,
                                   void *out) {
    int64_t col_tiles = (cols + 3) / 4, all = (rows + 127) / 128 * 128 * col_tiles;
    CQ_LAUNCH(tile, cq_blocks(all, THREADS), THREADS, 0, s, rows, cols, col_tiles, scales,
              (uint32_t *)out, all);
    CQ_CUDA_END("matmul_nvfp4, ordering scales");
}

extern "C" int cq_cuda_nvfp4_factors(cq_stream *s, const cq_matmul_nvfp4_args *a, float *out) {
    CQ_LAUNCH(factors, 1, CQ_WARP, 0, s, a->a_amax, a->b_amax, a->b_top, (float)a->beta, out);
    CQ_CUDA_END("matmul_nvfp4, its factors");
}
