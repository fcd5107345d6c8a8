// The custom op encnet::Encoding for ONNX Runtime, on the CPU; ort_cuda_host.cpp adds the arithmetic on NVIDIA GPUs:
// x (B, D, H, W) float or float16, codewords (K, D) float, scale (K,) float -> encoded (B, K, D) float; attribute
// reference_positions (0 where it is left out).
//
// A file that carries the op's body as a model-local function runs without these libraries too; see
// export/encoding_op.py.
#pragma once

#include <stdio.h>
#include <stdlib.h>

#include "encoding.h"
#include "ort_api.h"

namespace {

constexpr int MOST_DIMENSIONS = 4;

struct Kernel {
    Ort ort;
    float reference_positions;
};

struct Tensor {
    const char *name;
    void *data;
    OrtElementType type;
    size_t dimensions;
    int64_t sizes[MOST_DIMENSIONS];
};

OrtStatus *read_input(const Ort &ort, const OrtKernelContext *context, size_t index, Tensor *tensor) {
    const OrtValue *value = nullptr;
    OrtTensorTypeAndShapeInfo *info = nullptr;
    OrtStatus *status = ort.input(context, index, &value);
    if (!status) status = ort.data(const_cast<OrtValue *>(value), &tensor->data);
    if (!status) status = ort.type_and_shape(value, &info);
    if (!status) status = ort.element_type(info, &tensor->type);
    if (!status) status = ort.dimensions(info, &tensor->dimensions);
    if (!status && tensor->dimensions <= MOST_DIMENSIONS) status = ort.sizes(info, tensor->sizes, tensor->dimensions);
    if (info) ort.release(info);
    return status;
}

// "[2, 512, 45, 60]" into `text`.
void write_shape(const Tensor &tensor, char *text, size_t room) {
    int used = snprintf(text, room, "[");
    for (size_t i = 0; i < tensor.dimensions && i < MOST_DIMENSIONS; ++i)
        used += snprintf(text + used, room - size_t(used), i ? ", %lld" : "%lld", static_cast<long long>(tensor.sizes[i]));
    snprintf(text + used, room - size_t(used), tensor.dimensions > MOST_DIMENSIONS ? ", ...]" : "]");
}

OrtStatus *wrong_shape(const Ort &ort, const Tensor &tensor, const char *wanted, const Tensor &other) {
    char got[128], beside[128], message[512];
    write_shape(tensor, got, sizeof got);
    write_shape(other, beside, sizeof beside);
    snprintf(message, sizeof message, "encnet::Encoding: %s must be %s, got %s; %s is %s", tensor.name, wanted, got,
             other.name, beside);
    return ort.error(ORT_INVALID_ARGUMENT, message);
}

OrtStatus *check(const Ort &ort, const Tensor &x, const Tensor &codewords, const Tensor &scale) {
    if (x.type != ORT_FLOAT && x.type != ORT_FLOAT16)
        return ort.error(ORT_INVALID_ARGUMENT, "encnet::Encoding: x must be float or float16");
    if (x.dimensions != 4 || x.sizes[1] < 1) return wrong_shape(ort, x, "(B, D, H, W)", codewords);
    if (codewords.dimensions != 2 || codewords.sizes[0] < 1 || codewords.sizes[1] != x.sizes[1])
        return wrong_shape(ort, codewords, "(K, D) with x's D", x);
    if (scale.dimensions != 1 || scale.sizes[0] != codewords.sizes[0])
        return wrong_shape(ort, scale, "(K,) with the codewords' K", codewords);
    return nullptr;
}

// What the arithmetic needs; every pointer is in the execution provider's memory.
struct Call {
    encnet_sizes sizes;
    encnet_features x;
    const float *codewords, *scale;
    float *encoded;
};

OrtStatus *failed(const Ort &ort, const char *why) {
    char message[256];
    snprintf(message, sizeof message, "encnet::Encoding: %s", why);
    return ort.error(ORT_FAIL, message);
}

// Read and check the inputs and make the output.
OrtStatus *prepare(const Kernel &kernel, OrtKernelContext *context, Call *call) {
    const Ort &ort = kernel.ort;
    Tensor x{"x", {}, {}, 0, {}}, codewords{"codewords", {}, {}, 0, {}}, scale{"scale", {}, {}, 0, {}};
    OrtStatus *status = read_input(ort, context, 0, &x);
    if (!status) status = read_input(ort, context, 1, &codewords);
    if (!status) status = read_input(ort, context, 2, &scale);
    if (!status) status = check(ort, x, codewords, scale);
    if (status) return status;

    const int64_t batch = x.sizes[0], channels = x.sizes[1], positions = x.sizes[2] * x.sizes[3];
    const int64_t out_sizes[] = {batch, codewords.sizes[0], channels};
    OrtValue *out = nullptr;
    void *encoded = nullptr;
    status = ort.output(context, 0, out_sizes, 3, &out);
    if (!status) status = ort.data(out, &encoded);
    if (status) return status;

    const float reference = kernel.reference_positions;
    const float factor = reference && positions ? reference / static_cast<float>(positions) : 1;
    const int32_t dtype = x.type == ORT_FLOAT ? ENCNET_FLOAT32 : ENCNET_FLOAT16;
    *call = {{batch, channels, positions, codewords.sizes[0], factor},
             {x.data, channels * positions, positions, 1, dtype},
             static_cast<const float *>(codewords.data),
             static_cast<const float *>(scale.data),
             static_cast<float *>(encoded)};
    return nullptr;
}

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

OrtStatus *compute_on_cpu(void *self, OrtKernelContext *context) {
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

// The op in one execution provider's memory.
struct Op : OrtCustomOp {
    const char *provider;
};

OrtStatus *create_kernel(const OrtCustomOp *, const OrtApi *api, const OrtKernelInfo *info, void **kernel) {
    const Ort ort{api};
    float reference_positions = 0;
    if (OrtStatus *left_out = ort.attribute(info, "reference_positions", &reference_positions)) {
        ort.release(left_out);
        reference_positions = 0;
    }
    void *memory = malloc(sizeof(Kernel));
    if (!memory) return failed(ort, "no memory");
    *kernel = memory;
    *static_cast<Kernel *>(memory) = Kernel{ort, reference_positions};
    return nullptr;
}

Op encoding_op(const char *provider, OrtStatus *(*compute)(void *kernel, OrtKernelContext *context)) {
    Op op{};
    op.provider = provider;
    op.version = ORT_VERSION;
    op.GetName = [](const OrtCustomOp *) { return "Encoding"; };
    op.GetExecutionProviderType = [](const OrtCustomOp *self) { return static_cast<const Op *>(self)->provider; };
    op.GetInputTypeCount = [](const OrtCustomOp *) { return size_t{3}; };
    op.GetInputType = [](const OrtCustomOp *, size_t index) { return index == 0 ? ORT_ANY_TYPE : ORT_FLOAT; };
    op.GetOutputTypeCount = [](const OrtCustomOp *) { return size_t{1}; };
    op.GetOutputType = [](const OrtCustomOp *, size_t) { return ORT_FLOAT; };
    op.GetInputCharacteristic = [](const OrtCustomOp *, size_t) { return ORT_REQUIRED; };
    op.GetOutputCharacteristic = [](const OrtCustomOp *, size_t) { return ORT_REQUIRED; };
    op.GetInputMemoryType = [](const OrtCustomOp *, size_t) { return int32_t{0}; };
    op.CreateKernelV2 = create_kernel;
    op.KernelComputeV2 = compute;
    op.KernelDestroy = free;
    return op;
}

// The host's table: the op once for each execution provider, and how many there are.
extern const Op OPS[];
extern const int OP_COUNT;

// Why the host cannot run the op on this machine; null where it can.
const char *host_trouble();

// The op in its domain; null where ONNX Runtime refuses it.
OrtCustomOpDomain *make_domain(const Ort &ort) {
    OrtCustomOpDomain *domain = nullptr;
    OrtStatus *refusal = ort.create_domain("encnet", &domain);
    for (int i = 0; i < OP_COUNT && !refusal; ++i) refusal = ort.add_op(domain, &OPS[i]);
    if (!refusal) return domain;
    ort.release(refusal);
    return nullptr;
}

}  // namespace

// What ONNX Runtime calls when a session registers the library. One domain serves every session and is never freed.
extern "C" ENCNET_API OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *api = base->GetApi(ORT_VERSION);
    if (!api) return nullptr;  // an older ONNX Runtime: the file's own function runs
    const Ort ort{api};
    if (const char *trouble = host_trouble()) return ort.error(ORT_FAIL, trouble);
    static OrtCustomOpDomain *const domain = make_domain(ort);
    return domain ? ort.add_domain(options, domain) : ort.error(ORT_FAIL, "encnet::Encoding cannot be registered");
}
