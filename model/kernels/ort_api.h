// The part of ONNX Runtime's C interface that a custom op needs; its Python package ships no headers.
//
// The interface only grows at its end, so an entry of `OrtApi` is known by its place. The numbers are those of version 19
// (onnxruntime_c_api.h, ONNX Runtime 1.19) and hold for every later one.
#pragma once

#include <stddef.h>
#include <stdint.h>

constexpr uint32_t ORT_VERSION = 19;

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

enum OrtElementType : int32_t { ORT_ANY_TYPE = 0, ORT_FLOAT = 1, ORT_FLOAT16 = 10 };
enum OrtErrorCode : int32_t { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum OrtCharacteristic : int32_t { ORT_REQUIRED = 0 };

struct OrtApi {
    void *entries[275];
};

struct OrtApiBase {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)();
};

struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    OrtElementType (*GetInputType)(const OrtCustomOp *, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    OrtElementType (*GetOutputType)(const OrtCustomOp *, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *kernel, OrtKernelContext *);
    void (*KernelDestroy)(void *kernel);
    OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp *, size_t index);
    OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp *, size_t index);
    int32_t (*GetInputMemoryType)(const OrtCustomOp *, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, void *context);
    int (*GetStartVersion)(const OrtCustomOp *);
    int (*GetEndVersion)(const OrtCustomOp *);
    size_t (*GetMayInplace)(int **inputs, int **outputs);
    void (*ReleaseMayInplace)(int *inputs, int *outputs);
    size_t (*GetAliasMap)(int **inputs, int **outputs);
    void (*ReleaseAliasMap)(int *inputs, int *outputs);
};

// The entries by name. They return null, or an error that the caller hands on or releases.
struct Ort {
    const OrtApi *api;

    template <int PLACE, typename Result, typename... Arguments>
    Result call(Arguments... arguments) const {
        return reinterpret_cast<Result (*)(Arguments...)>(api->entries[PLACE])(arguments...);
    }

    OrtStatus *error(OrtErrorCode code, const char *message) const {
        return call<0, OrtStatus *>(code, message);
    }
    void release(OrtStatus *status) const { call<93, void>(status); }

    OrtStatus *create_domain(const char *name, OrtCustomOpDomain **domain) const {
        return call<26, OrtStatus *>(name, domain);
    }
    OrtStatus *add_op(OrtCustomOpDomain *domain, const OrtCustomOp *op) const {
        return call<27, OrtStatus *>(domain, op);
    }
    OrtStatus *add_domain(OrtSessionOptions *options, OrtCustomOpDomain *domain) const {
        return call<28, OrtStatus *>(options, domain);
    }
    OrtStatus *attribute(const OrtKernelInfo *info, const char *name, float *value) const {
        return call<85, OrtStatus *>(info, name, value);
    }
    OrtStatus *input(const OrtKernelContext *context, size_t index, const OrtValue **value) const {
        return call<90, OrtStatus *>(context, index, value);
    }
    OrtStatus *output(OrtKernelContext *context, size_t index, const int64_t *sizes, size_t dimensions,
                      OrtValue **value) const {
        return call<91, OrtStatus *>(context, index, sizes, dimensions, value);
    }
    OrtStatus *data(OrtValue *value, void **data) const { return call<51, OrtStatus *>(value, data); }
    OrtStatus *type_and_shape(const OrtValue *value, OrtTensorTypeAndShapeInfo **info) const {
        return call<65, OrtStatus *>(value, info);
    }
    OrtStatus *element_type(const OrtTensorTypeAndShapeInfo *info, OrtElementType *type) const {
        return call<60, OrtStatus *>(info, type);
    }
    OrtStatus *dimensions(const OrtTensorTypeAndShapeInfo *info, size_t *count) const {
        return call<61, OrtStatus *>(info, count);
    }
    OrtStatus *sizes(const OrtTensorTypeAndShapeInfo *info, int64_t *sizes, size_t count) const {
        return call<62, OrtStatus *>(info, sizes, count);
    }
    void release(OrtTensorTypeAndShapeInfo *info) const { call<99, void>(info); }

    // The cudaStream_t of the session.
    OrtStatus *stream(const OrtKernelContext *context, void **stream) const {
        return call<193, OrtStatus *>(context, stream);
    }

    // Run task(work, 0..count-1) on the session's threads.
    OrtStatus *parallel_for(const OrtKernelContext *context, void (*task)(void *, size_t), size_t count,
                            void *work) const {
        return call<274, OrtStatus *>(context, task, count, size_t{0}, work);
    }
};
