#pragma once

#include "src/autograd/tape.h"

namespace fathom::ops {

struct RopeOptions {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  double theta = 10000.0;
  double norm_eps = 1e-5;  // of QK-norm
  RopeScaling scaling = {};
};

/// Rotates the query and key heads of packed rows by their positions, after QK-norm when weights are given.
/// qkv [N, (H+2G)d], positions int32 [N], q_norm and k_norm stat [d] or undefined. A qkv that is moved in and
/// held by nobody else is rotated in place, unless there is QK-norm.
Tensor rope(Context& c, Tensor qkv, const Tensor& positions, const Tensor& q_norm, const Tensor& k_norm,
            const RopeOptions& options);

struct CacheCodeOptions {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  int bits = 4;  // or 8
};

/// Packed rows with keys and values as a cache of codes holds them (kernels/cache_codes.h), keys without
/// `key_means`, stat [G, d] or undefined. In place, where nobody else holds qkv [N, (H+2G)d]. Has no
/// gradient. InternalError: a tape records.
Tensor cache_round_trip(Context& c, Tensor qkv, const Tensor& key_means, const CacheCodeOptions& options);

struct AttentionOptions {
  std::int64_t batch = 0;
  std::int64_t seq = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
};

/// Causal attention with scale 1/sqrt(d). qkv [B*T, (H+2G)d]; first_key int32 [B*T] or undefined
/// (kernels/backend.h).
Tensor attention(Context& c, const Tensor& qkv, const Tensor& first_key, const AttentionOptions& options);

}  // namespace fathom::ops
