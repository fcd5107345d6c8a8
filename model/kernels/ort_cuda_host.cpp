// ONNX Runtime's library for NVIDIA GPUs: the op on the session's stream. It holds the op for CPUs as well, because ONNX
// Runtime goes over to the CPU where its CUDA provider does not start, and does not fall back on the file's own function
// once an op of that name is registered.

#include <cuda_runtime_api.h>

#include <mutex>
#include <set>

#include "encoding_cuda.h"
#include "ort_op.h"

namespace {

const int LEAST_MAJOR = 8;                       // of the compute capability
const uint64_t KEPT_BYTES = uint64_t(64) << 20;  // of workspace, between two runs

// A pool gives all its memory back to the driver whenever the stream is waited for, unless told otherwise: once for each
// device. Where that fails runs are slower, and no less right.
void keep_workspace(int device) {
    static std::mutex mutex;
    static std::set<int> done;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!done.insert(device).second) return;
    cudaMemPool_t pool = nullptr;
    uint64_t kept = KEPT_BYTES;
    if (!cudaDeviceGetDefaultMemPool(&pool, device))
        cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept);
}

OrtStatus *compute_on_cuda(void *self, OrtKernelContext *context) {
    const Kernel &kernel = *static_cast<Kernel *>(self);
    Call call;
    void *stream = nullptr;
    if (OrtStatus *status = prepare(kernel, context, &call)) return status;
    if (OrtStatus *status = kernel.ort.stream(context, &stream)) return status;
    if (call.sizes.batch == 0) return nullptr;

    cudaPointerAttributes place{};
    int64_t bytes = 0;
    encnet_cuda cuda{0, stream, nullptr};
    cudaError_t error = cudaPointerGetAttributes(&place, call.encoded);
    cuda.device = place.device;
    int status = error ? ENCNET_CUDA_ERROR + error : encnet_cuda_workspace(&call.sizes, &call.x, cuda.device, 0, &bytes);
    if (!status && bytes) {  // from the device's pool, and given back in the stream's order
        keep_workspace(cuda.device);
        error = cudaMallocAsync(&cuda.workspace, size_t(bytes), static_cast<cudaStream_t>(stream));
        if (error) status = ENCNET_CUDA_ERROR + error;
    }
    if (!status) status = encnet_encode_cuda(&call.sizes, &call.x, call.codewords, call.scale, call.encoded, &cuda);
    if (cuda.workspace) cudaFreeAsync(cuda.workspace, static_cast<cudaStream_t>(stream));
    if (!status) return nullptr;
    if (status >= ENCNET_CUDA_ERROR) return failed(kernel.ort, encnet_cuda_error(status));
    char why[64];
    snprintf(why, sizeof why, "the kernel failed, encnet_status %d", status);
    return failed(kernel.ort, why);
}

const Op OPS[] = {encoding_op("CUDAExecutionProvider", compute_on_cuda),
                  encoding_op("CPUExecutionProvider", compute_on_cpu)};
const int OP_COUNT = 2;

// Where there is no GPU at all the op for CPUs is the one that runs.
const char *host_trouble() {
    int device = 0, major = LEAST_MAJOR;
    if (!cudaGetDevice(&device)) cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major < LEAST_MAJOR ? "its CUDA kernels need a GPU of compute capability 8.0 or later" : nullptr;
}

}  // namespace
