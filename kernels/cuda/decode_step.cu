// One step of decoding (kernels/decoder.h) as one launch: as many blocks of threads as the device has
// multiprocessors stay for the whole step, and meet between its phases (decode_grid.cuh).
//
//   of each layer   decide      routed layers: the predictor's hidden layer, then who is computed
//                   project     norm, W_qkv
//                   attend      QK-norm, RoPE, append, attention over pieces of the entries
//                   (join)      the pieces' results, where there are many rows and pieces
//                   mix         W_o
//                   expand      norm of stream + branch, W_gate and W_up, SwiGLU
//                   contract    W_down, gate, the residual stream
//   at the end      head        norm, logits, the best of them; a draw, where one is asked for
//
// A layer that nobody goes through costs its decision and nothing else: every block of threads finds the same
// answer for itself. Norms are applied behind the products: W (x w / rms) = (W (x w)) / rms.
#include <algorithm>

#include "kernels/backend.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/decode_attention.cuh"
#include "kernels/cuda/device/decode_grid.cuh"
#include "kernels/cuda/device/decode_product.cuh"
#include "kernels/cuda/device/sigmoid.cuh"
#include "kernels/error.h"

namespace fathom::cuda {

namespace {

/// Pieces of all rows' entries that each block of threads may as well join for itself.
constexpr int kJoinedByAll = 16;

/// What stays in shared memory for the whole step; staged rows and partial sums follow it, or attention's
/// room.
struct Fixed {
  Matrix matrices[6];                        // by Product
  float squares[kDecodeRows][kDecodeWarps];  // partial sums: of squares, or of the router's score
  float logits[kDecodeRows][kDecodeWarps];   // of predictors, likewise
  float scales[kDecodeRows];                 // 1 / rms of the staged rows
  float gates[kDecodeRows];
  bool is_computed[kDecodeRows];
  AttentionDeal deal;  // of the rows that a layer computes
  double before[kDecodeRows];
  float greatest[kDecodeRows];
  float scratch[kDecodeWarps];
};

__host__ __device__ constexpr std::size_t rounded(std::size_t bytes) { return (bytes + 127) / 128 * 128; }

/// The layout of dynamic shared memory.
struct Layout {
  std::size_t layers, rotation, ring, open;
  __host__ __device__ Layout(int depth, int rows, int head_dim, int ring_bytes) {
    layers = rounded(sizeof(Fixed));
    rotation = layers + rounded(sizeof(DecodeLayer) * static_cast<std::size_t>(depth));
    ring = rotation + rounded(sizeof(float2) * static_cast<std::size_t>(rows * head_dim / 2));
    open = ring + rounded(static_cast<std::size_t>(ring_bytes));
  }
};

/// The products of a step, in the order in which a layer has them.
enum class Product : int { Decide, Project, Mix, Expand, Contract, Head, Unknown };

struct Place {
  Product product;
  int layer;
};

template <int kHalves, int kRing, int kDim>
class Step {
 public:
  __device__ Step(const DecodeStep& s, unsigned char* shared)
      : s_(s),
        grid_(s.arrivals, s.turn),
        fixed_(*reinterpret_cast<Fixed*>(shared)),
        layout_(s.depth, s.rows, kDim, WeightStream<kRing>::kBytes),
        layers_(reinterpret_cast<DecodeLayer*>(shared + layout_.layers)),
        rotation_(reinterpret_cast<float2*>(shared + layout_.rotation)),
        open_(shared + layout_.open),
        thread_(static_cast<int>(threadIdx.x)),
        warp_(thread_ / 32),
        lane_(thread_ % 32),
        stream_(shared + layout_.ring) {}

  __device__ void run() {
    prepare();
    Place now = first_of(0);
    if (has_product(now)) open(now);
    for (;;) {
      stage(now);
      if (has_product(now)) multiply(now);
      if (now.product == Product::Head) break;
      Place next = expected_after(now);
      if (has_product(now)) {
        if (now.product == Product::Project) {
          attend(layers_[now.layer], next);
        } else {
          if (has_product(next)) open(next);
          meet();
        }
      }
      if (now.product == Product::Decide) {
        decide(layers_[now.layer]);
        const Place decided =
            fixed_.deal.rows > 0 ? Place{Product::Project, now.layer} : first_of(now.layer + 1);
        const bool as_expected =
            has_product(now) && decided.product == next.product && decided.layer == next.layer;
        if (!as_expected && has_product(decided)) open(decided);
        next = decided;
      }
      now = next;
    }
    find_candidates();
    grid_.arrive();
    meet();
    choose();
  }

 private:
  // --- the order of products
  __device__ __forceinline__ Place first_of(int layer) const {
    if (layer == s_.depth) return {Product::Head, layer};
    return {layers_[layer].routed >= 0 ? Product::Decide : Product::Project, layer};
  }
  /// Without a predictor a decision is each block of threads' own.
  __device__ __forceinline__ bool has_product(const Place& p) const {
    return p.product != Product::Decide || s_.by_predictor != 0;
  }
  /// A few rows most likely pass a routed layer by; of many, one goes through it.
  __device__ __forceinline__ Place expected_after(const Place& p) const {
    constexpr int kFew = 4;
    if (p.product == Product::Decide)
      return s_.rows <= kFew ? first_of(p.layer + 1) : Place{Product::Project, p.layer};
    if (p.product == Product::Contract) return first_of(p.layer + 1);
    if (p.product == Product::Head) return {Product::Head, p.layer + 1};  // the end
    return {static_cast<Product>(static_cast<int>(p.product) + 1), p.layer};
  }
  __device__ __forceinline__ const __nv_bfloat16* weights_of(const Place& p) const {
    if (p.product == Product::Head) return s_.head;
    const DecodeLayer& l = layers_[p.layer];
    switch (p.product) {
      case Product::Decide:
        return l.predictor_in;
      case Product::Project:
        return l.qkv;
      case Product::Mix:
        return l.out;
      case Product::Expand:
        return l.gate_up;
      default:
        return l.down;
    }
  }
  __device__ __forceinline__ const Matrix& matrix_of(const Place& p) const {
    return fixed_.matrices[static_cast<int>(p.product)];
  }
  __device__ __forceinline__ Matrix& matrix(Product p) { return fixed_.matrices[static_cast<int>(p)]; }
  __device__ __forceinline__ void open(const Place& p) { stream_.open(weights_of(p), matrix_of(p)); }

  __device__ void prepare() {
    constexpr int kWords = sizeof(DecodeLayer) / sizeof(unsigned);
    const auto* from = reinterpret_cast<const unsigned*>(s_.layers);
    auto* to = reinterpret_cast<unsigned*>(layers_);
    for (int i = thread_; i < kWords * s_.depth; i += kDecodeThreads) to[i] = from[i];
    for (int i = thread_; i < s_.rows * kDim / 2; i += kDecodeThreads) {
      const Rotation r = rotation_at(s_.row[i / (kDim / 2)].position, s_.frequencies[i % (kDim / 2)]);
      rotation_[i] = float2{r.cosine, r.sine};
    }
    if (blockIdx.x == 0) {
      for (int i = thread_; i < s_.updates; i += kDecodeThreads)
        s_.tables[s_.update[i].at] = s_.update[i].block;
    }
    if (thread_ == 0) {
      matrix(Product::Decide).deal(s_.predictor_hidden, s_.width, 0, 0);
      matrix(Product::Project).deal((s_.heads + 2 * s_.kv_heads) * kDim, s_.width, 0, 0);
      matrix(Product::Mix).deal(s_.width, s_.heads * kDim, 0, 0);
      matrix(Product::Expand).deal(2 * s_.hidden, s_.width, s_.hidden, 0);
      matrix(Product::Contract).deal(s_.width, s_.hidden, 0, 0);
      matrix(Product::Head).deal(s_.vocab, s_.width, 0, 1);
    }
    all_rows();
  }

  /// Elements e .. e+7 of a row of what is normed. Until the blocks have met, that is the embedding, which
  /// the first block writes down.
  __device__ __forceinline__ uint4 stream_at(int row, int e) {
    const std::int64_t at = static_cast<std::int64_t>(row) * s_.width + e;
    if (met_) return __ldcg(reinterpret_cast<const uint4*>(s_.to_norm + at));
    const uint4 raw = *reinterpret_cast<const uint4*>(
        s_.embedding + static_cast<std::int64_t>(s_.row[row].token) * s_.width + e);
    if (blockIdx.x == 0) {
      *reinterpret_cast<uint4*>(s_.to_norm + at) = raw;
      float* const to = s_.x + at;
      const std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        *reinterpret_cast<float2*>(to + 2 * i) = float2{low_of(words[i]), high_of(words[i])};
    }
    return raw;
  }
  static __device__ __forceinline__ float low_of(std::uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float high_of(std::uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000U);
  }
  __device__ __forceinline__ void meet() {
    grid_.wait();
    met_ = true;
  }

  // --- rows into shared memory
  __device__ std::uint32_t* staged() const { return reinterpret_cast<std::uint32_t*>(open_); }
  __device__ float* partial(int width) const {
    return reinterpret_cast<float*>(
        open_ + rounded(static_cast<std::size_t>(Staged<kHalves>::bytes(width, s_.rows))));
  }

  __device__ __forceinline__ void stage(const Place& p) {
    const DecodeLayer& l = layers_[min(p.layer, s_.depth - 1)];
    if (p.product == Product::Mix) {
      if (joined_) {
        stage_rows(s_.mixed, s_.heads * kDim);
      } else {
        stage_pieces();
      }
    } else if (p.product == Product::Contract) {
      stage_rows(s_.activations, s_.hidden);
    } else {
      if (p.product == Product::Project && l.routed < 0) all_rows();
      stage_stream(p.product == Product::Decide    ? l.router
                   : p.product == Product::Expand  ? l.post_norm
                   : p.product == Product::Project ? l.input_norm
                                                   : s_.final_norm,
                   p.product == Product::Decide);
    }
    __syncthreads();
    // Read behind the product, after another wait for each other.
    if (p.product == Product::Project && thread_ == kDecodeThreads - 1) deal_entries(l);
    if (thread_ < s_.rows && p.product != Product::Decide) fixed_.scales[thread_] = reciprocal_rms(thread_);
  }
  /// The stream. With a norm's weights: times these, and the sums of its squares. With a router's: as it is,
  /// and the sums of its products with these.
  __device__ __forceinline__ void stage_stream(const float* weight, bool router) {
    std::uint32_t* const to = staged();
    const int stride = Staged<kHalves>::stride(s_.width);
#pragma unroll 2
    for (int row = 0; row < s_.rows; ++row) {
      float sum = 0;
#pragma unroll 1
      for (int e = 8 * thread_; e < s_.width; e += 8 * kDecodeThreads) {
        const uint4 raw = stream_at(row, e);
        const float4 w[2] = {*reinterpret_cast<const float4*>(weight + e),
                             *reinterpret_cast<const float4*>(weight + e + 4)};
        const std::uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = low_of(words[i]), y = high_of(words[i]);
          const float wx = i % 2 == 0 ? w[i / 2].x : w[i / 2].z, wy = i % 2 == 0 ? w[i / 2].y : w[i / 2].w;
          sum += router ? x * wx + y * wy : x * x + y * y;
          Staged<kHalves>::put(to, stride, row, e + 2 * i, router ? words[i] : pack_bf16(x * wx, y * wy));
        }
      }
      sum = warp_reduce(sum, Sum{});
      if (lane_ == 0) fixed_.squares[row][warp_] = sum;
    }
  }
  /// Rows of bf16 as they are.
  __device__ __forceinline__ void stage_rows(const __nv_bfloat16* from, int width) {
    std::uint32_t* const to = staged();
    const int stride = Staged<kHalves>::stride(width), packs = width / 8;
    int row = 0, e = thread_;
#pragma unroll 4
    for (int i = thread_; i < s_.rows * packs; i += kDecodeThreads) {
      while (e >= packs) e -= packs, ++row;
      const uint4 raw = __ldcg(reinterpret_cast<const uint4*>(from + static_cast<std::int64_t>(i) * 8));
      Staged<kHalves>::put(to, stride, row, e * 8, raw.x);
      Staged<kHalves>::put(to, stride, row, e * 8 + 2, raw.y);
      Staged<kHalves>::put(to, stride, row, e * 8 + 4, raw.z);
      Staged<kHalves>::put(to, stride, row, e * 8 + 6, raw.w);
      e += kDecodeThreads;
    }
  }
  /// Attention's pieces, joined: by every block of threads for itself.
  __device__ __forceinline__ void stage_pieces() {
    std::uint32_t* const to = staged();
    const int size = s_.heads * kDim, stride = Staged<kHalves>::stride(size);
#pragma unroll 1
    for (int i = thread_; i < fixed_.deal.rows * size / 4; i += kDecodeThreads) {
      const int head = i / (kDim / 4), e = i % (kDim / 4) * 4, row = head / s_.heads;
      const float4 y = joined(row, head - row * s_.heads, e);
      const int column = (head - row * s_.heads) * kDim + e;
      Staged<kHalves>::put(to, stride, fixed_.deal.row[row], column, pack_bf16(y.x, y.y));
      Staged<kHalves>::put(to, stride, fixed_.deal.row[row], column + 2, pack_bf16(y.z, y.w));
    }
  }
  __device__ __forceinline__ float sum_of_warps(int row) const {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) sum += fixed_.squares[row][w];
    return sum;
  }
  __device__ __forceinline__ float reciprocal_rms(int row) const {
    return rsqrtf(sum_of_warps(row) / static_cast<float>(s_.width) + s_.norm_eps);
  }

  // --- products
  __device__ __forceinline__ void multiply(const Place& p) {
    const Matrix& m = matrix_of(p);
    const int rows = s_.rows, g = lane_ / 4, first = m.first, tiles = m.tiles;
    float* const sums = partial(m.width);
    // What results are added to or multiplied by does not wait for them.
    if (p.product == Product::Decide && thread_ < s_.predictor_hidden)
      predictor_weight_ = layers_[p.layer].predictor_out[thread_];
    if ((p.product == Product::Contract || p.product == Product::Mix) && thread_ < tiles * rows * 8) {
      const int item = thread_ / 8, tile = item / rows;
      const int at = (first + tile) * 8 + thread_ % 8;
      const std::int64_t i = static_cast<std::int64_t>(item - tile * rows) * s_.width + at;
      if (at < m.rows) {
        stream_before_ = __ldcg(s_.x + i);
        if (p.product == Product::Contract) branch_before_ = __ldcg(s_.branch + i);
      }
    }
    const bool is_head = p.product == Product::Head;
    const float scale[2] = {is_head && g < rows ? reciprocal_rms(g) : 1.0F,
                            kHalves == 2 && is_head && g + 8 < rows ? reciprocal_rms(g + 8) : 1.0F};
    stream_.template run<kHalves>(m, staged(), rows, [&](int tile, const float(&c)[4]) {
      const int column = lane_ % 4 * 2;
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        const int row = g + 8 * h;
        if (row >= rows) continue;
        const float2 pair{c[2 * h] * scale[h], c[2 * h + 1] * scale[h]};
        if (is_head) {
          const int id = (first + tile) * 8 + column;
          float* const to = s_.logits + static_cast<std::int64_t>(row) * s_.vocab + id;
          if (id < s_.vocab) to[0] = pair.x;
          if (id + 1 < s_.vocab) to[1] = pair.y;
        } else {
          float* const to = sums + ((tile * kDecodeWarps + warp_) * rows + row) * 8 + column;
          *reinterpret_cast<float2*>(to) = pair;
        }
      }
    });
    if (is_head) return;
    __syncthreads();
    // Warps that have nothing to add up go on to ask for the next weights.
    const int results = (tiles * rows) << (m.half > 0 ? 2 : 3);
    const int writers = max(1, min(kDecodeWarps, (results + 31) / 32));
    if (warp_ >= writers) return;
    add_up(p, m, sums);
    grid_.arrive_with(writers);
  }
  /// The warps' sums of this block's tiles: [tiles][warps][rows][8].
  __device__ __forceinline__ void add_up(const Place& p, const Matrix& m, const float* sums) {
    const bool halves = m.half > 0;
    const int shift = halves ? 2 : 3, most = halves ? m.half : m.rows, rows = s_.rows, tiles = m.tiles;
#pragma unroll 1
    for (int i = thread_; i < (tiles * rows) << shift; i += kDecodeThreads) {
      const int item = i >> shift, column = i & ((1 << shift) - 1);
      const int tile = rows == 1 ? item : item / rows, row = item - tile * rows;
      const int at = ((m.first + tile) << shift) + column;
      const float* from = sums + (tile * kDecodeWarps * rows + row) * 8 + column;
      float sum = 0, other = 0;
#pragma unroll
      for (int part = 0; part < kDecodeWarps; ++part, from += rows * 8) {
        sum += from[0];
        if (halves) other += from[4];
      }
      if (at < most) take(p, row, at, sum, other, i == thread_);
    }
  }
  /// A product's result: row, column, and for two halves the one that belongs to it; whether it is this
  /// thread's first.
  __device__ __forceinline__ void take(const Place& p, int row, int at, float sum, float other, bool first) {
    const DecodeLayer& l = layers_[min(p.layer, s_.depth - 1)];
    const std::int64_t i = static_cast<std::int64_t>(row) * s_.width + at;
    switch (p.product) {
      case Product::Decide: {
        const float z = sum + l.predictor_bias[at];
        predicted(l)[row * s_.predictor_hidden + at] = z / (1.0F + expf(-z));
        break;
      }
      case Product::Project:
        s_.qkv[static_cast<std::int64_t>(row) * (s_.heads + 2 * s_.kv_heads) * kDim + at] =
            sum * fixed_.scales[row];
        break;
      case Product::Mix:
        s_.branch[i] = sum;
        s_.to_norm[i] = __float2bfloat16_rn((first ? stream_before_ : __ldcg(s_.x + i)) + sum);
        break;
      case Product::Expand: {
        const float scale = fixed_.scales[row], z = sum * scale;
        s_.activations[static_cast<std::int64_t>(row) * s_.hidden + at] =
            __float2bfloat16_rn(__fdividef(z, 1.0F + __expf(-z)) * (other * scale));
        break;
      }
      default: {  // Contract
        float x = first ? stream_before_ : __ldcg(s_.x + i);
        if (fixed_.is_computed[row]) {
          x += fixed_.gates[row] * ((first ? branch_before_ : __ldcg(s_.branch + i)) + sum);
          s_.x[i] = x;
        }
        s_.to_norm[i] = __float2bfloat16_rn(x);
      }
    }
  }

  // --- who is computed
  __device__ __forceinline__ void all_rows() {
    __syncthreads();
    if (thread_ < s_.rows) {
      fixed_.deal.row[thread_] = thread_;
      fixed_.is_computed[thread_] = true;
      fixed_.gates[thread_] = 1.0F;
      fixed_.deal.rows = s_.rows;
    }
    __syncthreads();
  }
  __device__ __forceinline__ float gate_of(float score) const {
    if (s_.gate == static_cast<int>(GateKind::Sigmoid)) return 1.0F / (1.0F + expf(-score));
    if (s_.gate == static_cast<int>(GateKind::Tanh)) return tanhf(score);
    return score;
  }
  /// Two in turn: a block of threads may be a decision ahead of another.
  __device__ __forceinline__ float* predicted(const DecodeLayer& l) const {
    return s_.predicted + static_cast<std::int64_t>(l.routed % 2) * kDecodeRows * s_.predictor_hidden;
  }
  __device__ __forceinline__ void decide(const DecodeLayer& layer) {
    const float* const hidden = predicted(layer);
    if (s_.by_predictor) {
#pragma unroll 4
      for (int row = 0; row < s_.rows; ++row) {
        float logit = 0;
        for (int e = thread_; e < s_.predictor_hidden; e += kDecodeThreads)
          logit = fmaf(__ldcg(hidden + row * s_.predictor_hidden + e),
                       e == thread_ ? predictor_weight_ : layer.predictor_out[e], logit);
        logit = warp_reduce(logit, Sum{});
        if (lane_ == 0) fixed_.logits[row][warp_] = logit;
      }
      __syncthreads();
    }
    if (thread_ < s_.rows) {
      const float score = sum_of_warps(thread_);
      float logit = score;
      if (s_.by_predictor) {
        logit = layer.predictor_last[0];
#pragma unroll
        for (int w = 0; w < kDecodeWarps; ++w) logit += fixed_.logits[thread_][w];
      }
      fixed_.is_computed[thread_] = logit > s_.threshold;
      fixed_.gates[thread_] = gate_of(score);
      if (blockIdx.x == 0) s_.outcome->kept[layer.routed][thread_] = logit > s_.threshold ? 1 : 0;
    }
    __syncthreads();
    if (thread_ == 0) {
      int n = 0;
      for (int row = 0; row < s_.rows; ++row) {
        if (fixed_.is_computed[row]) fixed_.deal.row[n++] = row;
      }
      fixed_.deal.rows = n;
    }
    __syncthreads();
  }

  // --- attention
  /// Whoever has few steps for each block of threads keeps to one head in each: a second one would be waited
  /// for as long as the first. Where there are many steps, nobody shall have more than another.
  __device__ __forceinline__ void deal_entries(const DecodeLayer& layer) {
    constexpr int kMany = 4 * kDecodeWarps;  // steps of a block of threads
    AttentionDeal& d = fixed_.deal;
    const int blocks = static_cast<int>(gridDim.x);
    int total = 0, longest = 1;
#pragma unroll 1
    for (int i = 0; i < d.rows; ++i) {
      d.entries[i] = entries_of(layer, d.row[i]);
      d.steps[i] = max(1, (d.entries[i] + 15) / 16);
      d.start[i] = total;
      total += d.steps[i] * s_.kv_heads;
      longest = max(longest, d.steps[i]);
    }
    const int pairs = d.rows * s_.kv_heads;
    d.total = total;
    d.even = total >= kMany * blocks;
    if (d.even) {
      d.blocks = min(blocks, pairs * (kDecodeSplits - 2));
      d.pieces = min(kDecodeSplits, static_cast<int>(static_cast<long long>(longest) * d.blocks / total) + 2);
    } else {
      d.pieces = max(1, min(min(blocks / pairs, kDecodeSplits), (longest + kDecodeWarps - 1) / kDecodeWarps));
      d.blocks = pairs * d.pieces;
    }
  }
  /// The piece that a block of threads has at a step of an even deal, or as piece number `at` of all.
  __device__ __forceinline__ AttentionPiece piece_at(int at, int end) const {
    const AttentionDeal& d = fixed_.deal;
    if (!d.even) {
      const int pair = at / d.pieces, i = pair / s_.kv_heads, piece = at - pair * d.pieces;
      const int each = (d.steps[i] + d.pieces - 1) / d.pieces, first = min(piece * each, d.steps[i]);
      return {d.row[i],  d.entries[i], pair - i * s_.kv_heads, piece, {first, min(first + each, d.steps[i])},
              piece == 0};
    }
    int i = 0;
    while (i + 1 < d.rows && d.start[i + 1] <= at) ++i;
    const int head = (at - d.start[i]) / d.steps[i], from = d.start[i] + head * d.steps[i];
    const int first = at - from;
    return {d.row[i],
            d.entries[i],
            head,
            static_cast<int>(blockIdx.x) - d.block_of(from),
            {first, min(d.steps[i], first + end - at)},
            first == 0};
  }
  /// Between the arrival of the projection and its being seen: entries of earlier steps wait for nothing.
  /// Leaves attention in pieces, or joined in `mixed`.
  __device__ __forceinline__ void attend(const DecodeLayer& layer, const Place& next) {
    auto& room = *reinterpret_cast<AttentionRoom<kDim>*>(open_);
    const AttentionDeal& d = fixed_.deal;
    const int block = static_cast<int>(blockIdx.x);
    int at = block, end = d.blocks;
    if (d.even) {
      at = block < d.blocks ? d.first_step(block) : 0;
      end = block < d.blocks ? d.first_step(block + 1) : 0;
    }
    bool seen = false;
#pragma unroll 1
    while (at < end) {
      const AttentionPiece piece = piece_at(at, end);
      EntryWalk<kDim> walk = begin_piece<kDim>(s_, layer, piece);
      if (!seen) {
        open(next);
        meet();
      }
      seen = true;
      attend_piece<kDim>(s_, layer, piece, rotation_ + piece.row * (kDim / 2), walk, room);
      at += d.even ? piece.range.end - piece.range.first : static_cast<int>(gridDim.x);
    }
    if (!seen) {
      open(next);
      meet();
    }
    grid_.arrive();
    meet();
    joined_ = d.pieces * d.rows > kJoinedByAll;
    if (!joined_) return;
    const int total = d.rows * s_.heads * kDim / 4;
#pragma unroll 1
    for (int i = block * kDecodeThreads + thread_; i < total;
         i += static_cast<int>(gridDim.x) * kDecodeThreads) {
      const int head = i / (kDim / 4), e = i % (kDim / 4) * 4, row = head / s_.heads;
      const std::int64_t of = static_cast<std::int64_t>(d.row[row]) * s_.heads + head % s_.heads;
      const float4 y = joined(row, head % s_.heads, e);
      *reinterpret_cast<uint2*>(s_.mixed + of * kDim + e) = uint2{pack_bf16(y.x, y.y), pack_bf16(y.z, y.w)};
    }
    grid_.arrive();
    meet();
  }
  /// Attention of the computed row number i.
  __device__ __forceinline__ float4 joined(int i, int head, int e) const {
    const AttentionDeal& d = fixed_.deal;
    return join_pieces<kDim>(s_, static_cast<std::int64_t>(d.row[i]) * s_.heads + head, e,
                             d.pieces_of(i, head / (s_.heads / s_.kv_heads)));
  }
  __device__ __forceinline__ int entries_of(const DecodeLayer& layer, int row) const {
    return layer.routed < 0 ? s_.row[row].position : s_.entries[row][layer.routed];
  }

  // --- the choice
  static __device__ __forceinline__ DecodeCandidate better(const DecodeCandidate& a,
                                                           const DecodeCandidate& b) {
    const bool first = a.value > b.value || (a.value == b.value && a.id < b.id);
    return {first ? a.value : b.value, first ? a.id : b.id, a.finite & b.finite};
  }
  static __device__ __forceinline__ DecodeCandidate from_lane(const DecodeCandidate& a, int across) {
    return {__shfl_xor_sync(kFullWarp, a.value, across), __shfl_xor_sync(kFullWarp, a.id, across),
            __shfl_xor_sync(kFullWarp, a.finite, across)};
  }
  static constexpr int kNobody = 0x7fffffff;

  /// The best of this block's own ids, a row a warp.
  __device__ __forceinline__ void find_candidates() {
    __syncthreads();
    const Matrix& m = matrix(Product::Head);
    const int first = m.first * 8, end = min((m.first + m.tiles) * 8, s_.choices);
#pragma unroll 1
    for (int row = warp_; row < s_.rows; row += kDecodeWarps) {
      DecodeCandidate best{-INFINITY, kNobody, 1};
#pragma unroll 4
      for (int id = first + lane_; id < end; id += 32) {
        const float z = s_.logits[static_cast<std::int64_t>(row) * s_.vocab + id];
        best = better(best, {z, id, isfinite(z) ? 1 : 0});
      }
#pragma unroll
      for (int across = 16; across > 0; across /= 2) best = better(best, from_lane(best, across));
      if (lane_ == 0) s_.candidates[blockIdx.x * kDecodeRows + row] = best;
    }
  }

  __device__ __forceinline__ void choose() {
    bool draws = false;
    for (int row = 0; row < s_.rows; ++row) draws = draws || s_.row[row].inverse_temperature > 0;
    if (!draws && blockIdx.x != 0) return;
    for (int row = warp_; row < s_.rows; row += kDecodeWarps) {
      DecodeCandidate best{-INFINITY, kNobody, 1};
      for (int i = lane_; i < static_cast<int>(gridDim.x); i += 32) {
        const auto* from = s_.candidates + i * kDecodeRows + row;
        best = better(best, {__ldcg(&from->value), __ldcg(&from->id), __ldcg(&from->finite)});
      }
#pragma unroll
      for (int across = 16; across > 0; across /= 2) best = better(best, from_lane(best, across));
      if (lane_ != 0) continue;
      fixed_.greatest[row] = best.value;
      if (blockIdx.x != 0) continue;
      s_.outcome->finite[row] = best.finite;
      if (s_.row[row].inverse_temperature == 0) s_.outcome->token[row] = best.id == kNobody ? 0 : best.id;
    }
    if (draws) draw();
  }

  /// A token from softmax(z / temperature): every block of threads sums the exponentials of its own ids, and
  /// the one in which the share falls finds it.
  __device__ __forceinline__ void draw() {
    __syncthreads();
    const Matrix& m = matrix(Product::Head);
    const int first = min(m.first * 8, s_.choices), end = min((m.first + m.tiles) * 8, s_.choices);
    const int blocks = static_cast<int>(gridDim.x);
    for (int row = 0; row < s_.rows; ++row) {
      if (s_.row[row].inverse_temperature == 0) continue;
      float sum = 0;
      for (int id = first + thread_; id < end; id += kDecodeThreads) sum += exponential(row, id);
      sum = workers_sum(sum);
      if (thread_ == 0) s_.sums[row * blocks + static_cast<int>(blockIdx.x)] = sum;
    }
    grid_.arrive();
    meet();
    for (int row = warp_; row < s_.rows; row += kDecodeWarps) {
      if (s_.row[row].inverse_temperature == 0) continue;
      double before = 0, total = 0, own = 0;
      int last = 0;  // block with anything to draw
      for (int base = 0; base < blocks; base += 32) {
        const int i = base + lane_, me = static_cast<int>(blockIdx.x) - base;
        const double sum = i < blocks ? __ldcg(s_.sums + row * blocks + i) : 0.0F;
        const double up_to = scan(sum);
        const unsigned any = __ballot_sync(kFullWarp, sum > 0);
        if (any != 0) last = base + 31 - __clz(static_cast<int>(any));
        const double mine = __shfl_sync(kFullWarp, sum, me & 31),
                     with = __shfl_sync(kFullWarp, up_to, me & 31);
        if (me >= 0 && me < 32) own = mine, before = total + with - mine;
        total += __shfl_sync(kFullWarp, up_to, 31);
      }
      // Rounding may leave the share behind the last sum, or between two: then it is the last block's, or the
      // earlier one's last token.
      const double share = s_.row[row].uniform * total;
      const bool found =
          own > 0 && share >= before && (share < before + own || last == static_cast<int>(blockIdx.x));
      if (lane_ == 0) fixed_.before[row] = found ? share - before : -1.0;
    }
    __syncthreads();
    for (int row = warp_; row < s_.rows; row += kDecodeWarps) {
      if (s_.row[row].inverse_temperature == 0 || fixed_.before[row] < 0) continue;
      const int id = find(row, first, end, fixed_.before[row]);
      if (lane_ == 0) s_.outcome->token[row] = id;
    }
  }
  __device__ __forceinline__ float workers_sum(float sum) {
    sum = warp_reduce(sum, Sum{});
    if (lane_ == 0) fixed_.scratch[warp_] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) sum += fixed_.scratch[w];
    __syncthreads();
    return sum;
  }
  /// Of the lanes up to and with this one.
  __device__ __forceinline__ double scan(double sum) const {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const double other = __shfl_up_sync(kFullWarp, sum, offset);
      if (lane_ >= offset) sum += other;
    }
    return sum;
  }
  __device__ __forceinline__ float exponential(int row, int id) const {
    const float z = s_.logits[static_cast<std::int64_t>(row) * s_.vocab + id];
    return expf((z - fixed_.greatest[row]) * s_.row[row].inverse_temperature);
  }
  __device__ __forceinline__ int find(int row, int first, int end, double share) const {
    double before = 0;
    int last = first;
    for (int base = first; base < end; base += 32) {
      const int id = base + lane_;
      const float e = id < end ? exponential(row, id) : 0.0F;
      const double sum = scan(e);
      const unsigned found = __ballot_sync(kFullWarp, e > 0 && share < before + sum);
      if (found != 0) return base + __ffs(static_cast<int>(found)) - 1;
      const unsigned any = __ballot_sync(kFullWarp, e > 0);
      if (any != 0) last = base + 31 - __clz(static_cast<int>(any));
      before += __shfl_sync(kFullWarp, sum, 31);
    }
    return last;
  }

  const DecodeStep& s_;
  Grid grid_;
  Fixed& fixed_;
  Layout layout_;
  DecodeLayer* layers_;
  float2* rotation_;
  unsigned char* open_;
  int thread_, warp_, lane_;
  bool met_ = false;
  bool joined_ = false;  // attention is in `mixed`
  float stream_before_ = 0, branch_before_ = 0, predictor_weight_ = 0;
  WeightStream<kRing> stream_;
};

template <int kHalves, int kRing, int kDim>
__global__ void __launch_bounds__(kDecodeThreads, 1) decode_kernel(const __grid_constant__ DecodeStep s) {
#if __CUDA_ARCH__ >= 900  // bulk copies; open_decoder() looks
  extern __shared__ __align__(128) unsigned char shared[];
  Step<kHalves, kRing, kDim>(s, shared).run();
#endif
}

using Kernel = void (*)(DecodeStep);

template <int kHalves, int kRing>
Kernel kernel_for(int head_dim) {
  if (head_dim == 64) return decode_kernel<kHalves, kRing, 64>;
  if (head_dim == 128) return decode_kernel<kHalves, kRing, 128>;
  throw InternalError("[decode_step] heads of 64 or 128 elements");
}

template <int kHalves>
std::size_t shared_bytes(const DecodeStep& s, int head_dim, int rows, int blocks, int ring_bytes) {
  const auto staged = [&](int width) {
    return rounded(static_cast<std::size_t>(Staged<kHalves>::bytes(width, rows)));
  };
  const auto product = [&](int out, int in, bool halves) {
    const int tiles = halves ? (out / 2 + 3) / 4 : (out + 7) / 8;
    const int most = (tiles + blocks - 1) / blocks;
    return staged(in) + static_cast<std::size_t>(kDecodeWarps * most * rows * 8) * sizeof(float);
  };
  const std::size_t attention = head_dim == 64 ? sizeof(AttentionRoom<64>) : sizeof(AttentionRoom<128>);
  const std::size_t most =
      std::max({attention, staged(s.width), product((s.heads + 2 * s.kv_heads) * head_dim, s.width, false),
                product(s.width, s.heads * head_dim, false), product(2 * s.hidden, s.width, true),
                product(s.width, s.hidden, false), product(s.predictor_hidden, s.width, false)});
  return Layout(s.depth, rows, head_dim, ring_bytes).open + rounded(most);
}

}  // namespace

DecodePlan plan_decode(const DecodeStep& s, int head_dim, int rows, int blocks, std::size_t shared) {
  // The more rows, the less room there is for loads ahead.
  constexpr int kLong = 33, kMedium = 22, kShort = 8;
  const auto variant = [&]<int kHalves, int kRing>() -> DecodePlan {
    const std::size_t bytes = shared_bytes<kHalves>(s, head_dim, rows, blocks, WeightStream<kRing>::kBytes);
    if (rows > 8 * kHalves || bytes > shared) return {};
    return {reinterpret_cast<const void*>(kernel_for<kHalves, kRing>(head_dim)), bytes};
  };
  DecodePlan plan = variant.template operator()<1, kLong>();
  if (plan.kernel == nullptr) plan = variant.template operator()<1, kMedium>();
  if (plan.kernel == nullptr) plan = variant.template operator()<2, kShort>();
  return plan;
}

void prepare_decode(const DecodePlan& plan, std::size_t shared) {
  check(cudaFuncSetAttribute(plan.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared)),
        "decode_step");
}

void launch_decode(const DecodePlan& plan, const DecodeStep& s, int blocks, cudaStream_t stream) {
  void* arguments[] = {const_cast<DecodeStep*>(&s)};
  check(cudaLaunchCooperativeKernel(plan.kernel, dim3(static_cast<unsigned>(blocks)), dim3(kDecodeThreads),
                                    arguments, plan.shared_bytes, stream),
        "decode_step");
}

}  // namespace fathom::cuda
