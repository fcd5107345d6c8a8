// Between encoding_cuda.cu, compiled once for each type of x and pass, and cuda_dispatch.cpp, which chooses one.
#pragma once

#include "encoding_cuda.h"

// With `bytes`, only say how much workspace the call needs; with `text`, how it would run; with neither, queue it.
struct CudaCall {
    const encnet_sizes *sizes;
    const encnet_features *x, *grad_x;  // grad_x null in the forward pass
    const float *codewords, *scale, *grad;
    float *result, *scale_result;
    const encnet_cuda *cuda;
    int64_t *bytes;
    char *text;
    size_t text_room;
};

struct CudaKernels {
    int (*call)(const CudaCall &);            // returns an encnet_status, or ENCNET_CUDA_ERROR and more
    const char *(*error_text)(int cuda_error);
};

extern const CudaKernels cuda_forward_float32, cuda_forward_float16, cuda_forward_bfloat16;
extern const CudaKernels cuda_backward_float32, cuda_backward_float16, cuda_backward_bfloat16;
