// The CPU kernel for the PyTorch host: on OpenMP's threads, which PyTorch's own operators use too.

#include "encoding.h"

namespace {

void run_with_openmp(void *pool, size_t count, encnet_task task, void *work) {
    const int threads = *static_cast<const int32_t *>(pool);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t index = 0; index < count; ++index) task(work, index);
}

encnet_threads openmp(int32_t &threads) { return {threads > 1 ? run_with_openmp : nullptr, &threads}; }

}  // namespace

extern "C" {

ENCNET_API int encnet_torch_encode(const encnet_sizes *sizes, const encnet_features *x, const float *codewords,
                                   const float *scale, float *encoded, int32_t threads) {
    const encnet_threads pool = openmp(threads);
    return encnet_encode_cpu(sizes, x, codewords, scale, encoded, &pool);
}

ENCNET_API int encnet_torch_encode_backward(const encnet_sizes *sizes, const encnet_features *x, const float *codewords,
                                            const float *scale, const float *grad, const encnet_features *grad_x,
                                            float *grad_codewords, float *grad_scale, int32_t threads) {
    const encnet_threads pool = openmp(threads);
    return encnet_encode_backward_cpu(sizes, x, codewords, scale, grad, grad_x, grad_codewords, grad_scale, &pool);
}

}
