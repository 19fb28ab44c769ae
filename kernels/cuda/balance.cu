/// balance.cu - the weight of the layerwise term from the losses, and a report of both for the
/// host. The arithmetic is kernels/ref/balance.c's, bit for bit.
///
/// Losses are fetched by all threads and added up by one, in the order it is told. 52 layers: 2 KB,
/// and as much in additions one after the other as a launch takes, 3 us. `report` lies in memory of
/// the host.
#include "kernels/cuda/cq_cuda.h"

namespace {

enum { THREADS = 256 };

__global__ void __launch_bounds__(THREADS) balance(cq_balance_args a) {
    CQ_SHARED(double, loss, [THREADS]);
    CQ_SHARED(double, each, [1]);
    int64_t at = (int64_t)threadIdx.x;
    double sum = 0.0;
    for (int64_t first = 0; first < a.n; first += THREADS) {
        if (first + at < a.n)
            loss[at] = a.stats[4 * a.order[first + at] + 3];
        __syncthreads();
        for (int64_t i = 0; at == 0 && i < THREADS && first + i < a.n; i++)
            sum += 1.0 - (1.0 - loss[i]);
        __syncthreads();
    }
    if (at == 0) {
        double weight = 0.0;
        if (a.ratio) {
            double kl = *a.sum / a.valid, gap = a.n > 0 ? sum / (double)a.n : 0.0;
            weight = (kl > 0.0 ? kl : 0.0) / (gap > 1e-8 ? gap : 1e-8);
            weight = weight < a.most ? weight : a.most;
        }
        a.report[0] = *a.sum;
        a.report[1] = (double)*a.right;
        a.report[2] = weight;
        *each = weight / (double)a.n * a.share;
    }
    __syncthreads();
    for (int64_t i = at; i < a.n; i += THREADS) {
        a.report[3 + i] = a.stats[4 * i + 3];
        if (a.ratio)
            a.weights[i] = *each;
    }
}

} // namespace

extern "C" int cq_cuda_balance(cq_stream *s, const cq_balance_args *a) {
    CQ_LAUNCH(balance, 1, THREADS, 0, s, *a);
    CQ_CUDA_END("balance");
}
