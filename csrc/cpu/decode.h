// One token through all layers of a Llama-shaped decoder, on raw pointers: the caller has checked every size.
//
// Legend: H hidden size, D width of a head, room: positions that the cache has.
#pragma once
#include "kernels.h"
#include "threads.h"

namespace qat {

// The linears hold weights only; tokens, outputs and scratch are the decoder's. qkv gives all q heads, then k, then v.
struct DecoderLayer {
  const float* norm;  // [H]
  Linear qkv, o;
  const float* mlp_norm;  // [H]
  Linear gate_up, down;
  const float *q_norm, *k_norm;  // [D], or null: heads are not normalized
};

struct Decoder {
  const Isa* isa;
  const DecoderLayer* layers;
  int64_t count;  // of layers
  int64_t hidden, heads, kv_heads, width, rotary, room;
  float norm_eps, scaling;  // of the norms, and of q K^T
  float *keys, *values;     // [layers, KV heads, room, D]; the token's are written at `position`
  int64_t position;
  const float *cos, *sin;  // [rotary], of `position`
};

// x [H], in place: x += o(attend(qkv(norm(x)))), then x += down(silu(gate(norm(x))) * up(norm(x))), for each layer.
void decode(const Decoder& p, const Threads& threads, float* x);

}  // namespace qat
