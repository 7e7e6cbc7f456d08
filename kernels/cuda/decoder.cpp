#include "kernels/cuda/decoder.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/cache_codes.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/error.h"

namespace fathom::cuda {

namespace {

constexpr const char* kOp = "decode_step";

const __nv_bfloat16* matrix(const ConstView& v) { return static_cast<const __nv_bfloat16*>(v.data); }
const float* vector(const ConstView& v) { return static_cast<const float*>(v.data); }

const void* matrix(const DecoderMatrix& m) { return m.is_packed() ? m.codes.codes.data : m.numbers.data; }

/// The matrices of a layer's products.
std::array<DecoderMatrix, 4> matrices(const DecoderLayer& l) { return {l.qkv, l.out, l.gate_up, l.down}; }

bool fits_tiles(std::int64_t width) { return width >= 256 && width % 32 == 0; }
bool aligned(const ConstView& v) { return reinterpret_cast<std::uintptr_t>(v.data) % 16 == 0; }

/// Columns that share a scale in those matrices that have several a row; 0: none has.
std::int64_t group_of(const DecoderModel& m) {
  std::int64_t group = 0;
  for (const DecoderLayer& l : m.layers) {
    for (const DecoderMatrix& w : matrices(l)) {
      if (w.is_packed() && w.codes.format.group < w.codes.format.columns) group = w.codes.format.group;
    }
  }
  return group;
}

bool fits_codes(const PackedView& w) {
  const PackedFormat& f = w.format;
  return f.bits == 4 && f.columns % kCodeRun == 0 && (f.group == f.columns || f.group % kCodeRun == 0) &&
         f.row_bytes() == f.columns / 2 && aligned(w.codes);
}

/// Numbers all of them, or all of them codes: with one scale a row, or all with as many columns a scale.
bool fit(const DecoderModel& m) {
  const std::int64_t group = group_of(m);
  bool all = true;
  for (const DecoderLayer& l : m.layers) {
    for (const DecoderMatrix& w : matrices(l)) {
      all = all && w.is_packed() == m.layers[0].qkv.is_packed();
      if (!w.is_packed()) {
        all = all && aligned(w.numbers);
      } else {
        const PackedFormat& f = w.codes.format;
        all = all && fits_codes(w.codes) && f.group == (group > 0 ? group : f.columns);
      }
    }
  }
  return all;
}

/// Means of keys for all layers, or for none.
bool fit_key_means(const DecoderModel& m) {
  bool all = true;
  for (const DecoderLayer& l : m.layers) {
    const ConstView& v = l.key_means;
    all = all && static_cast<bool>(v) == static_cast<bool>(m.layers[0].key_means) &&
          (!v || (v.dtype == DType::F32 && v.size == m.qkv.kv_heads * m.qkv.head_dim));
  }
  return all;
}

bool supports(const DecoderModel& m) {
  const QkvShape& q = m.qkv;
  bool all = !m.layers.empty() && m.embedding.dtype == DType::BF16 &&
             (q.head_dim == 64 || q.head_dim == 128) && q.kv_heads > 0 && q.heads % q.kv_heads == 0 &&
             q.heads / q.kv_heads <= kDecodeGroup && fits_tiles(m.width) && fits_tiles(m.hidden) &&
             fits_tiles(q.heads * q.head_dim) && m.layers.size() <= kDecodeLayers;
  all = all && fit(m) && fit_key_means(m);
  std::size_t routed = 0;
  for (const DecoderLayer& l : m.layers) {
    routed += l.routed ? 1 : 0;
    for (const ConstView& v : {l.input_norm, l.post_norm, l.router, l.predictor_in, l.predictor_out})
      all = all && aligned(v);
  }
  // Transforms are for caches of codes; a power of two has Sylvester's matrix.
  all = all && (m.cache.bits == 16 ? !m.transforms_heads : is_cache_of_codes(m.cache.bits));
  return all && routed <= kDecodeRouted && aligned(m.embedding) && aligned(m.head) && aligned(m.final_norm);
}

/// What the kernel's plan is made from.
void describe_sizes(DecodeStep& s, const DecoderModel& m) {
  s.depth = static_cast<int>(m.layers.size());
  s.vocab = static_cast<int>(m.vocab);
  s.width = static_cast<int>(m.width);
  s.hidden = static_cast<int>(m.hidden);
  s.heads = static_cast<int>(m.qkv.heads);
  s.kv_heads = static_cast<int>(m.qkv.kv_heads);
  s.bits = m.layers[0].qkv.is_packed() ? m.layers[0].qkv.codes.format.bits : 16;
  s.group = static_cast<int>(group_of(m));
  s.kv_bits = m.cache.bits;
}

class CudaDecoder final : public Decoder {
 public:
  /// `plans`: of 1, 2, ... rows; all launches may take `shared` bytes.
  CudaDecoder(CudaBackend& backend, const float* frequencies, const DecoderModel& model, int blocks,
              std::vector<DecodePlan> plans, std::size_t shared)
      : backend_(backend),
        head_dim_(static_cast<int>(model.qkv.head_dim)),
        blocks_(blocks),
        slots_(model.slots),
        plans_(std::move(plans)) {
    describe(model);
    step_.frequencies = frequencies;
    layers_ = upload_layers(model);
    step_.layers = static_cast<const DecodeLayer*>(layers_.get());
    if (step_.bits < 16) {
      scales_ = upload_scales(model);
      step_.scales = static_cast<const DecodeScales*>(scales_.get());
    }
    if (step_.kv_bits < 16 && model.layers[0].key_means) {
      key_means_ = gather_key_means(model);
      step_.key_means = static_cast<const float*>(key_means_.get());
    }
    take_memory();
    for (const DecodePlan& plan : plans_) prepare_decode(plan, shared);
    for (Launch& launch : launches_) {
      void* outcome = nullptr;
      check(cudaHostAlloc(&outcome, sizeof(DecodeOutcome), cudaHostAllocMapped), kOp);
      launch.outcome.reset(outcome);
      std::memset(outcome, 0, sizeof(DecodeOutcome));
      check(cudaHostGetDevicePointer(reinterpret_cast<void**>(&launch.mapped), outcome, 0), kOp);
      launch.over = make_event(kOp, cudaEventDisableTiming);
    }
  }
  ~CudaDecoder() override {
    // A launch that nobody waited for writes into what goes now.
    if (under_way_ > 0) cudaStreamSynchronize(backend_.stream());
  }

  std::int64_t most_rows() const override { return static_cast<std::int64_t>(plans_.size()); }

  void set_blocks(std::int64_t slot, std::int64_t table, std::int64_t first,
                  std::span<const std::int32_t> blocks, bool hold_entries) override {
    if (blocks.empty()) return;
    const std::int64_t end = first + static_cast<std::int64_t>(blocks.size());
    if (slot < 0 || slot >= slots_ || table < 0 || table > step_.routed_layers || first < 0 ||
        end > step_.most_blocks)
      throw InternalError("[decode_step] blocks outside of the tables");
    const std::int64_t at = (slot * (1 + step_.routed_layers) + table) * step_.most_blocks + first;
    forget_updates(at, static_cast<std::int64_t>(blocks.size()));
    // The kernel reads earlier entries before its blocks of threads have met.
    if (blocks.size() == 1 && !hold_entries && step_.updates < kDecodeUpdates) {
      step_.update[step_.updates++] = {static_cast<int>(at), blocks[0]};
      return;
    }
    backend_.copy_from_host(step_.tables + at, blocks.data(), blocks.size_bytes());
  }

  void launch(std::span<const DecoderRow> rows) override {
    if (rows.empty() || rows.size() > plans_.size())
      throw InternalError("[decode_step] as many rows as most_rows() says");
    if (under_way_ == std::ssize(launches_)) throw InternalError("[decode_step] two launches are under way");
    DecodeStep next = step_;
    next.rows = static_cast<int>(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const DecoderRow& r = rows[i];
      if (r.follows >= step_.rows) throw InternalError("[decode_step] a row follows none of the step before");
      next.row[i] = {
          static_cast<int>(r.slot),
          r.token,
          r.position,
          r.held,
          r.follows,
          r.temperature > 0 ? static_cast<float>(std::clamp(1 / r.temperature, 1e-30, 1e30)) : 0.0F,
          r.temperature <= 0 && r.wants_share ? 1 : 0,
          r.threshold,
          r.uniform};
      std::copy(r.entries, r.entries + step_.routed_layers, next.entries[i]);
    }
    next.turn = 1 - step_.turn;
    Launch& launch = launches_[static_cast<std::size_t>(next.turn)];
    next.outcome = launch.mapped;
    next.left = step_.left + next.turn;
    next.before = step_.left + step_.turn;
    next.logits = logits_of(next.turn);
    const DecodePlan& plan = plans_[rows.size() - 1];
    const DecodeRoom& room = plan.room_for(entry_share(rows));
    next.ring = room.ring;
    launch_decode(plan, room, next, blocks_, backend_.stream());
    // Only a launch makes the other turn's counter zero.
    step_.turn = next.turn;
    step_.rows = next.rows;
    step_.updates = 0;
    check(cudaEventRecord(launch.over.get(), backend_.stream()), kOp);
    launch.rows = rows.size();
    ++under_way_;
  }

  std::vector<DecoderResult> wait() override {
    if (under_way_ == 0) throw InternalError("[decode_step] no launch is under way");
    // The last one, or of two the other.
    waited_ = under_way_ == 1 ? step_.turn : 1 - step_.turn;
    --under_way_;
    const Launch& launch = launches_[static_cast<std::size_t>(waited_)];
    check(cudaEventSynchronize(launch.over.get()), kOp);
    const auto& outcome = *static_cast<const DecodeOutcome*>(launch.outcome.get());
    std::vector<DecoderResult> results(launch.rows);
    for (std::size_t i = 0; i < results.size(); ++i) {
      results[i].token = outcome.token[i];
      results[i].finite = outcome.finite[i] != 0;
      results[i].share = outcome.share[i];
      for (int l = 0; l < step_.routed_layers; ++l) results[i].kept.push_back(outcome.kept[l][i]);
    }
    return results;
  }

  ConstView logits_in_place(std::int64_t i) override {
    check_row(i);
    return {logits_of(waited_) + i * step_.vocab, step_.vocab, DType::F32};
  }
  void logits(std::int64_t i, std::span<float> out) override {
    check_row(i);
    if (static_cast<int>(out.size()) > step_.vocab) throw InternalError("[decode_step] logits: too many");
    backend_.copy_to_host(out.data(), logits_of(waited_) + i * step_.vocab, out.size_bytes());
  }

 private:
  /// One of two that the host may have to wait for.
  struct Launch {
    PinnedMemory outcome;
    DecodeOutcome* mapped = nullptr;
    EventHandle over;
    std::size_t rows = 0;
  };
  void check_row(std::int64_t i) const {
    const auto rows = static_cast<std::int64_t>(launches_[static_cast<std::size_t>(waited_)].rows);
    if (i < 0 || i >= rows) throw InternalError("[decode_step] no such row of logits");
  }
  float* logits_of(int turn) const {
    return step_.logits + static_cast<std::int64_t>(turn) * kDecodeRows * step_.vocab;
  }
  /// Bytes of keys and values that these rows read, for each byte of weights: of numbers of 16 bits, both.
  double entry_share(std::span<const DecoderRow> rows) const {
    double entries = 0;
    for (const DecoderRow& r : rows) {
      entries += static_cast<double>(step_.depth - step_.routed_layers) * r.held;
      for (int l = 0; l < step_.routed_layers; ++l) entries += r.entries[l];
    }
    const double d = head_dim_, heads = step_.heads * d, kv = 2 * step_.kv_heads * d, width = step_.width;
    const double weights = step_.depth * width * (2 * heads + kv + 3.0 * step_.hidden) + width * step_.vocab;
    return entries * kv / weights;
  }
  /// What was to be told of these places with a launch that never came.
  void forget_updates(std::int64_t at, std::int64_t n) {
    DecodeUpdate* const end =
        std::remove_if(step_.update, step_.update + step_.updates,
                       [&](const DecodeUpdate& u) { return u.at >= at && u.at < at + n; });
    step_.updates = static_cast<int>(end - step_.update);
  }
  void describe(const DecoderModel& m) {
    step_.embedding = matrix(m.embedding);
    step_.head = matrix(m.head);
    step_.final_norm = vector(m.final_norm);
    describe_sizes(step_, m);
    step_.choices = static_cast<int>(m.choices);
    step_.norm_eps = static_cast<float>(m.norm_eps);
    step_.qk_eps = static_cast<float>(m.qkv.norm_eps);
    constexpr double kLog2E = 1.4426950408889634074;
    step_.score_scale = static_cast<float>(m.cache.scale * kLog2E);
    step_.gate = static_cast<int>(m.gate);
    for (const DecoderLayer& l : m.layers) {
      step_.routed_layers += l.routed ? 1 : 0;
      if (l.predictor_in) step_.by_predictor = 1;
    }
    step_.predictor_hidden = step_.by_predictor != 0 ? static_cast<int>(m.predictor_hidden) : 0;
    step_.transforms_heads = m.transforms_heads ? 1 : 0;
    step_.pool = static_cast<__nv_bfloat16*>(m.pool.data);
    step_.block = static_cast<int>(m.cache.block);
    step_.stride = static_cast<int>(m.cache.stride);
    step_.most_blocks = static_cast<int>(m.most_blocks);
  }

  DeviceMemory upload_layers(const DecoderModel& m) {
    std::vector<DecodeLayer> layers;
    int routed = 0, dense = 0;
    for (const DecoderLayer& l : m.layers) {
      DecodeLayer d{};
      d.qkv = matrix(l.qkv), d.out = matrix(l.out), d.gate_up = matrix(l.gate_up), d.down = matrix(l.down);
      d.input_norm = vector(l.input_norm), d.post_norm = vector(l.post_norm);
      d.q_norm = vector(l.q_norm), d.k_norm = vector(l.k_norm);
      d.router = vector(l.router);
      d.predictor_in = matrix(l.predictor_in), d.predictor_bias = vector(l.predictor_bias);
      d.predictor_out = vector(l.predictor_out), d.predictor_last = vector(l.predictor_last);
      d.routed = l.routed ? routed++ : -1;
      d.dense = l.routed ? -1 : dense++;
      layers.push_back(d);
    }
    return upload(layers);
  }
  /// Side by side: a pointer more for each layer would be shared memory that a launch has for weights.
  DeviceMemory gather_key_means(const DecoderModel& m) {
    const auto each = static_cast<std::size_t>(m.layers[0].key_means.size) * sizeof(float);
    DeviceMemory memory = make_device_memory(kOp, m.layers.size() * each);
    std::size_t dense = 0, routed = m.layers.size() - static_cast<std::size_t>(step_.routed_layers);
    for (const DecoderLayer& l : m.layers) {
      char* const to = static_cast<char*>(memory.get()) + (l.routed ? routed++ : dense++) * each;
      check(cudaMemcpyAsync(to, l.key_means.data, each, cudaMemcpyDeviceToDevice, backend_.stream()), kOp);
    }
    return memory;
  }
  DeviceMemory upload_scales(const DecoderModel& m) {
    std::vector<DecodeScales> scales;
    for (const DecoderLayer& l : m.layers) {
      DecodeScales& s = scales.emplace_back();
      std::size_t i = 0;
      for (const DecoderMatrix& w : matrices(l)) s.of[i++] = vector(w.codes.scales);
    }
    return upload(scales);
  }
  template <typename Item>
  DeviceMemory upload(const std::vector<Item>& items) {
    DeviceMemory memory = make_device_memory(kOp, items.size() * sizeof(Item));
    backend_.copy_from_host(memory.get(), items.data(), items.size() * sizeof(Item));
    return memory;
  }

  // Zeros, so that no phase ever computes on what was in memory before.
  void take_memory() {
    const std::size_t rows = kDecodeRows, d = static_cast<std::size_t>(head_dim_);
    const auto n = [](int x) { return static_cast<std::size_t>(x); };
    std::size_t bytes = 0;
    const auto take = [&](auto*& pointer, std::size_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(bytes);
      bytes += (count * sizeof(*pointer) + 255) / 256 * 256;
    };
    const auto all = [&] {
      take(step_.x, rows * n(step_.width));
      take(step_.branch, rows * n(step_.width));
      take(step_.to_norm, rows * n(step_.width));
      take(step_.qkv, rows * n(step_.heads + 2 * step_.kv_heads) * d);
      take(step_.parts, rows * n(step_.heads) * kDecodeSplits * d);
      take(step_.part_weights, rows * n(step_.heads) * kDecodeSplits);
      take(step_.mixed, rows * n(step_.heads) * d);
      take(step_.activations, rows * n(step_.hidden));
      take(step_.predicted, 2 * rows * n(step_.predictor_hidden));
      take(step_.logits, 2 * rows * n(step_.vocab));
      take(step_.candidates, rows * n(blocks_));
      take(step_.sums, rows * n(blocks_));
      take(step_.arrivals, 2);
      take(step_.left, 2);
      take(step_.tables,
           static_cast<std::size_t>(slots_) * n(1 + step_.routed_layers) * n(step_.most_blocks));
    };
    all();
    memory_ = make_device_memory(kOp, bytes);
    check(cudaMemsetAsync(memory_.get(), 0, bytes, backend_.stream()), kOp);
    const auto base = reinterpret_cast<std::uintptr_t>(memory_.get());
    const auto move = [&](auto*& pointer) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
          base + reinterpret_cast<std::uintptr_t>(pointer));
    };
    move(step_.x), move(step_.branch), move(step_.to_norm), move(step_.qkv), move(step_.parts),
        move(step_.part_weights);
    move(step_.mixed), move(step_.activations), move(step_.predicted), move(step_.logits);
    move(step_.candidates), move(step_.sums), move(step_.arrivals), move(step_.left), move(step_.tables);
  }

  CudaBackend& backend_;
  int head_dim_, blocks_;
  std::int64_t slots_;
  std::vector<DecodePlan> plans_;
  DecodeStep step_{};
  DeviceMemory layers_, scales_, key_means_, memory_;
  std::array<Launch, 2> launches_;  // by turn
  std::ptrdiff_t under_way_ = 0;
  int waited_ = 0;  // the turn that wait() was for
};

}  // namespace

std::unique_ptr<Decoder> open_decoder(CudaBackend& backend, const float* frequencies,
                                      const DecoderModel& model) {
  if (!supports(model) || backend.options().invariant) return nullptr;
  int device = 0, cooperative = 0, shared = 0, major = 0;
  check(cudaGetDevice(&device), kOp);
  check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), kOp);
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
  if (cooperative == 0 || major < 9) return nullptr;
  DecodeStep sizes{};
  describe_sizes(sizes, model);
  sizes.predictor_hidden = static_cast<int>(model.predictor_hidden);
  const int head_dim = static_cast<int>(model.qkv.head_dim), blocks = backend.multiprocessors();
  std::vector<DecodePlan> plans;
  for (int rows = 1; rows <= std::min<std::int64_t>(kDecodeRows, model.most_rows); ++rows) {
    plans.push_back(plan_decode(sizes, head_dim, rows, blocks, static_cast<std::size_t>(shared)));
    if (plans.back().kernel != nullptr) continue;
    plans.pop_back();
    break;
  }
  if (plans.empty()) return nullptr;
  return std::make_unique<CudaDecoder>(backend, frequencies, model, blocks, std::move(plans),
                                       static_cast<std::size_t>(shared));
}

std::unique_ptr<Decoder> CudaBackend::make_decoder(const DecoderModel& model) {
  return open_decoder(*this, rope_frequencies(model.qkv), model);
}

}  // namespace fathom::cuda
