// The CUDA kernels doing nothing, so that what is left of a layer is the time of its calls: benchmarks/gpu/calls.py.
#include "cuda/kernels.h"
namespace qat::cuda {
int quantize_activation(const QuantizeActivation&, cudaStream_t) { return 0; }
int quantize_weight(const QuantizeWeight&, cudaStream_t) { return 0; }
int soften_weight(const float*, int64_t, int64_t, const float*, const float*, int64_t, const float*, Dtype, void*, void*, cudaStream_t) { return 0; }
int pack(const int8_t*, int64_t, int64_t, Layout, uint8_t*, uint64_t*, cudaStream_t) { return 0; }
int unpack(const uint8_t*, int64_t, int64_t, Layout, int8_t*, uint64_t*, cudaStream_t) { return 0; }
int repack(const uint8_t*, int64_t, int64_t, uint8_t*, uint64_t*, cudaStream_t) { return 0; }
int dequantize(const void*, bool, int64_t, int64_t, int64_t, const float*, int64_t, Dtype, void*, cudaStream_t) { return 0; }
int linear(const Linear&, cudaStream_t) { return 0; }
int64_t partial_bytes(const Linear&) { return 0; }
int64_t partial_bytes(const PackedLinear&) { return 0; }
int packed_linear(const PackedLinear&, cudaStream_t) { return 0; }
bool packed_linear_fused(const PackedLinear&) { return true; }
}
