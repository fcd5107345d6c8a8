// The C interface of the CPU kernel: checks its arguments and calls the code for this processor's widest instructions.

#include <string.h>

#include "cpu_kernels.h"

namespace {

struct Choice {
    const char *name;
    const CpuKernels *kernels;
    bool here;
};

Choice *choices() {
#ifdef ENCNET_X86
    __builtin_cpu_init();
    static Choice list[] = {
        {"avx512", &cpu_kernels_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                            __builtin_cpu_supports("fma")},
        {"avx2", &cpu_kernels_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
        {"baseline", &cpu_kernels_baseline, true},
    };
#else
    static Choice list[] = {{"baseline", &cpu_kernels_baseline, true}};
#endif
    return list;
}

const Choice *chosen = nullptr;

const Choice *widest() {
    const Choice *choice = choices();
    while (!choice->here) ++choice;
    return choice;
}

const Choice &current() {
    static const Choice *const usual = widest();
    return chosen ? *chosen : *usual;
}

int check(const encnet_sizes &sizes, const encnet_features &features) {
    if (sizes.batch < 0 || sizes.channels < 1 || sizes.positions < 0 || sizes.codewords < 1) return ENCNET_BAD_SIZES;
    if (features.dtype < ENCNET_FLOAT32 || features.dtype > ENCNET_BFLOAT16) return ENCNET_BAD_DTYPE;
    if (features.position_stride != 1 && features.channel_stride != 1) return ENCNET_BAD_STRIDES;
    return ENCNET_OK;
}

}  // namespace

int encnet_encode_cpu(const encnet_sizes *sizes, const encnet_features *x, const float *codewords, const float *scale,
                      float *encoded, const encnet_threads *threads) {
    const int status = check(*sizes, *x);
    return status ? status : current().kernels->encode(*sizes, *x, codewords, scale, encoded, threads);
}

int encnet_encode_backward_cpu(const encnet_sizes *sizes, const encnet_features *x, const float *codewords,
                               const float *scale, const float *grad, const encnet_features *grad_x,
                               float *grad_codewords, float *grad_scale, const encnet_threads *threads) {
    int status = check(*sizes, *x);
    if (!status) status = check(*sizes, *grad_x);
    if (!status && (x->position_stride == 1) != (grad_x->position_stride == 1)) status = ENCNET_BAD_STRIDES;
    if (status) return status;
    return current().kernels->encode_backward(*sizes, *x, codewords, scale, grad, *grad_x, grad_codewords, grad_scale,
                                              threads);
}

const char *encnet_cpu_instructions(void) { return current().name; }

int encnet_cpu_choose(const char *name) {
    const Choice *choice = choices();
    while (strcmp(choice->name, name) != 0) {
        if (strcmp(choice->name, "baseline") == 0) return -1;
        ++choice;
    }
    if (!choice->here) return -1;
    chosen = choice;
    return 0;
}

int encnet_interface(void) { return ENCNET_INTERFACE; }
