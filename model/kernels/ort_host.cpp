// The kernel as ONNX Runtime's custom op encnet::Encoding on the CPU, on the session's threads.

#include "ort_op.h"

namespace {

const char *const EXECUTION_PROVIDER = "CPUExecutionProvider";

// ONNX Runtime's threads as the kernel asks for them. A refusal is kept, and the work done one after another.
struct Threads {
    const Ort &ort;
    const OrtKernelContext *context;

    static void run(void *self, size_t count, encnet_task task, void *work) {
        const Threads &threads = *static_cast<Threads *>(self);
        if (OrtStatus *refusal = threads.ort.parallel_for(threads.context, task, count, work)) {
            threads.ort.release(refusal);
            for (size_t index = 0; index < count; ++index) task(work, index);
        }
    }
};

OrtStatus *compute(void *self, OrtKernelContext *context) {
    const Kernel &kernel = *static_cast<Kernel *>(self);
    Call call;
    if (OrtStatus *status = prepare(kernel, context, &call)) return status;
    Threads pool{kernel.ort, context};
    const encnet_threads threads{Threads::run, &pool};
    const int status = encnet_encode_cpu(&call.sizes, &call.x, call.codewords, call.scale, call.encoded, &threads);
    if (!status) return nullptr;
    char why[64];
    snprintf(why, sizeof why, "the kernel failed, encnet_status %d", status);
    return failed(kernel.ort, why);
}

}  // namespace
