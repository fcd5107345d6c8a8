// The C interface of the CUDA kernels: checks its arguments and calls the code for the type of x.

#include <string.h>

#include "cuda_kernels.h"

namespace {

int check(const encnet_sizes &sizes, const encnet_features &features) {
    if (sizes.batch < 0 || sizes.channels < 1 || sizes.positions < 0 || sizes.codewords < 1) return ENCNET_BAD_SIZES;
    if (features.dtype < ENCNET_FLOAT32 || features.dtype > ENCNET_BFLOAT16) return ENCNET_BAD_DTYPE;
    if (features.position_stride != 1 && features.channel_stride != 1) return ENCNET_BAD_STRIDES;
    return ENCNET_OK;
}

int call_kernels(const CudaCall &call, bool backward) {
    int status = check(*call.sizes, *call.x);
    if (!status && call.grad_x) {
        status = check(*call.sizes, *call.grad_x);
        if (!status && (call.x->position_stride == 1) != (call.grad_x->position_stride == 1)) status = ENCNET_BAD_STRIDES;
        if (!status && call.x->dtype != call.grad_x->dtype) status = ENCNET_BAD_DTYPE;
    }
    if (status) return status;
    static const CudaKernels *const table[][2] = {{&cuda_forward_float32, &cuda_backward_float32},
                                                  {&cuda_forward_float16, &cuda_backward_float16},
                                                  {&cuda_forward_bfloat16, &cuda_backward_bfloat16}};
    return table[call.x->dtype][backward]->call(call);
}

}  // namespace

int encnet_cuda_workspace(const encnet_sizes *sizes, const encnet_features *x, int32_t device, int32_t backward,
                          int64_t *bytes) {
    *bytes = 0;
    const encnet_cuda cuda{device, nullptr, nullptr};
    CudaCall call{};
    call.sizes = sizes, call.x = x, call.cuda = &cuda, call.bytes = bytes;
    return sizes->batch == 0 ? ENCNET_OK : call_kernels(call, backward);
}

const char *encnet_cuda_describe(const encnet_sizes *sizes, const encnet_features *x, int32_t device, int32_t backward) {
    static thread_local char text[160];
    const encnet_cuda cuda{device, nullptr, nullptr};
    CudaCall call{};
    call.sizes = sizes, call.x = x, call.cuda = &cuda;
    call.text = text, call.text_room = sizeof text;
    text[0] = 0;
    return sizes->batch && call_kernels(call, backward) ? "" : text;
}

int encnet_encode_cuda(const encnet_sizes *sizes, const encnet_features *x, const float *codewords, const float *scale,
                       float *encoded, const encnet_cuda *cuda) {
    if (sizes->batch == 0) return check(*sizes, *x);
    CudaCall call{};
    call.sizes = sizes, call.x = x, call.codewords = codewords, call.scale = scale, call.result = encoded;
    call.cuda = cuda;
    return call_kernels(call, false);
}

// Gradients of zero for a batch of none are the caller's to write: nothing is queued here that only clears memory.
int encnet_encode_backward_cuda(const encnet_sizes *sizes, const encnet_features *x, const float *codewords,
                                const float *scale, const float *grad, const encnet_features *grad_x,
                                float *grad_codewords, float *grad_scale, const encnet_cuda *cuda) {
    if (sizes->batch == 0) return ENCNET_BAD_SIZES;
    CudaCall call{};
    call.sizes = sizes, call.x = x, call.grad_x = grad_x, call.codewords = codewords, call.scale = scale;
    call.grad = grad, call.result = grad_codewords, call.scale_result = grad_scale;
    call.cuda = cuda;
    return call_kernels(call, true);
}

const char *encnet_cuda_error(int status) { return cuda_forward_float32.error_text(status - ENCNET_CUDA_ERROR); }

int encnet_cuda_interface(void) { return ENCNET_INTERFACE; }
