// Between encoding_cpu.cpp, compiled once for each instruction set, and cpu_dispatch.cpp, which chooses one.
#pragma once

#include "encoding.h"

struct CpuKernels {
    int (*encode)(const encnet_sizes &, const encnet_features &x, const float *codewords, const float *scale,
                  float *encoded, const encnet_threads *);
    int (*encode_backward)(const encnet_sizes &, const encnet_features &x, const float *codewords, const float *scale,
                           const float *grad, const encnet_features &grad_x, float *grad_codewords, float *grad_scale,
                           const encnet_threads *);
};

extern const CpuKernels cpu_kernels_baseline;
#ifdef ENCNET_X86
extern const CpuKernels cpu_kernels_avx2;
extern const CpuKernels cpu_kernels_avx512;
#endif
