// ONNX Runtime's library for CPUs.

#include "ort_op.h"

namespace {

const Op OPS[] = {encoding_op("CPUExecutionProvider", compute_on_cpu)};
const int OP_COUNT = 1;

const char *host_trouble() { return nullptr; }

}  // namespace
