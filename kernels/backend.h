// Every op that a backend has: some 40 functions over pointers and sizes, each forward directly above its
// backward.
//
// Shapes: B sequences, T tokens of a sequence, N = B*T rows, K kept tokens of a sequence, D width, H query
// heads, G key/value heads, d head size, F hidden width, V vocabulary. Everything is row-major and
// contiguous. Dtypes: activations and the weights of products and lookups (linear, embedding) are of one
// compute dtype (fp32, fp64, bf16); "stat" views (router scores, norms' reciprocals, losses, gradients of
// parameters, and the weights that are vectors: of norms, biases and scores) are fp32, or fp64 when the
// compute dtype is fp64; indices are int32. E experts have S slots each: rows of the stream that they
// compute. A backward overwrites its outputs, unless its name ends in _accumulate. Outputs never alias inputs
// unless said. Errors: InternalError for views whose sizes contradict the shape; CUDA and library codes are
// checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "kernels/cache_codes.h"
#include "kernels/dtype.h"
#include "kernels/flop_log.h"
#include "kernels/packed_matrix.h"
#include "kernels/rope_scaling.h"
#include "kernels/row_codes.h"
#include "kernels/shares.h"
#include "kernels/step_rule.h"

namespace fathom {

enum class GateKind : std::uint8_t { Raw, Sigmoid, Tanh };

struct LinearShape {
  std::int64_t rows = 0;  // N
  std::int64_t in = 0;
  std::int64_t out = 0;
  /// So many products side by side, each of `rows` rows and weights of its own: operands are [batch, ...].
  std::int64_t batch = 1;
  /// Elements from one row of x to the next, where x is part of wider rows; 0: `in`. The view of x then ends
  /// with its last row. For linear_forward and the gradients of the weights.
  std::int64_t x_stride = 0;

  constexpr std::int64_t x_row() const { return x_stride > 0 ? x_stride : in; }
  /// Elements of the view of x.
  std::int64_t x_size() const { return batch * rows > 0 ? (batch * rows - 1) * x_row() + in : 0; }
};

/// Of a norm, in magnitude: 2^-40, far below what a product of norms' outputs can show.
inline constexpr float kLeastNormWeight = 0x1p-40F;

/// Of a gate, in magnitude: 2^-60.
inline constexpr float kLeastSilu = 0x1p-60F;

struct NormShape {
  std::int64_t rows = 0;
  std::int64_t width = 0;
  double eps = 1e-5;
};

/// A packed projection row holds H query heads, then G key heads, then G value heads: (H + 2G) * d elements.
struct QkvShape {
  std::int64_t rows = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  double rope_theta = 10000.0;
  double norm_eps = 1e-5;  // of QK-norm
  RopeScaling rope_scaling = {};

  std::int64_t row_size() const { return (heads + 2 * kv_heads) * head_dim; }
};

struct AttentionShape {
  std::int64_t batch = 0;
  std::int64_t seq = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  double scale = 1.0;  // usually 1 / sqrt(d)
};

/// New rows of several sequences, and the pool of blocks that holds the keys and values of their earlier
/// ones. A block has `block` entries of one layer; how they lie in it is the backend's own.
struct CacheShape {
  std::int64_t rows = 0;  // of one sequence they stand together, in the order of their entries
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  double scale = 1.0;
  std::int64_t block = 0;               // entries of a block, a multiple of 16
  std::int64_t blocks = 0;              // of the pool
  std::int64_t sequences = 0;           // rows of the tables
  std::int64_t table = 0;               // blocks that a sequence may have: columns of the tables
  std::int64_t stride = 1, offset = 0;  // a table's block b is block b * stride + offset of the pool
  int bits = 16;                        // 4 or 8: codes (cache_codes.h); 16: numbers of the compute dtype
  /// What keys lose before they become codes, stat [kv_heads, head_dim]; undefined: nothing. Only what makes
  /// codes reads it, and of numbers nothing does.
  ConstView key_means = {};

  std::int64_t block_of(std::int64_t b) const { return b * stride + offset; }
  /// Of the compute dtype, or of uint8 where there are codes.
  std::int64_t block_elements() const {
    return 2 * kv_heads * block *
           (bits < 16 ? cache_code_bytes(head_dim, bits) + kCacheScaleBytes : head_dim);
  }
};

/// What is to follow a row of logits: the most likely token, or with a temperature above 0 one that is drawn
/// from softmax(logits / temperature), the one in which the share `uniform` of [0, 1) falls, the tokens'
/// probabilities laid side by side in the order of their ids.
struct TokenPick {
  double temperature = 0;
  double uniform = 0;
  std::int32_t token = 0;    // what was chosen; of equally likely ones the lowest id
  bool finite = true;        // all of the row's logits; else the token means nothing
  bool wants_share = false;  // at temperature 0
  double share = 1;          // of the token in softmax(logits), where that is wanted
};

/// Rows of a [B, T, width] stream that a block keeps: `rows` indices, each b*T + t, ascending.
struct GatherShape {
  std::int64_t source_rows = 0;  // B*T
  std::int64_t rows = 0;         // B*K in training; any number under a threshold
  std::int64_t width = 0;
};

/// What the experts of one MLP work on: `slots` of the `rows` of a stream, each expert. Several experts may
/// have a slot for one row, one expert has at most one.
struct ExpertShape {
  std::int64_t rows = 0;     // N
  std::int64_t experts = 0;  // E
  std::int64_t slots = 0;    // S
  std::int64_t width = 0;    // D
};

/// Independent normal numbers: those of `stream`, or, where `offset` is not null, int64 [1], of `stream` +
/// what stands there when they are drawn; from number `first` on.
struct NormalNumbers {
  std::uint64_t seed = 0;
  std::uint64_t stream = 0;
  ConstView offset = {};
  std::int64_t first = 0;
};

/// Choices of the rows of sequences: `seq` rows each.
struct SequenceChoices {
  std::int64_t rows = 0;
  std::int64_t seq = 0;
  std::int64_t choices = 0;  // experts, and no-ops
};

struct BackendOptions {
  bool invariant = false;      // a row's result does not depend on the other rows, nor on their number
  bool deterministic = false;  // bit-equal from run to run (the CPU always is)
};

/// Work that a backend recorded between begin_capture() and end_capture(). What it reads and writes must stay
/// allocated as long as it lives.
class CapturedWork {
 public:
  virtual ~CapturedWork() = default;
  /// Does all of it again, on the memory it was recorded with.
  virtual void launch() = 0;
};

/// A copy to the host that the device makes while the host goes on. One at a time; begin() may be called
/// again after wait(), or over a copy that nobody wants any more.
class Readback {
 public:
  virtual ~Readback() = default;
  /// Asks for a copy of what `source` holds after all that was asked of the backend before.
  virtual void begin(const void* source) = 0;
  /// Waits for that copy, and for nothing that was asked for after it. Valid until the next begin().
  virtual const void* wait() = 0;
};

class Decoder;  // decoder.h
struct DecoderModel;

class Backend {
 public:
  Backend();
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend();  // out of line: copies compiled for AVX must not give the linker theirs

  /// "CPU, AVX-512, 2 threads" and the like.
  virtual std::string description() const = 0;
  virtual bool is_cpu() const = 0;
  virtual const BackendOptions& options() const = 0;
  /// How many rows of logits the LM head should hold at a time.
  virtual std::int64_t head_chunk_rows() const { return 512; }

  // --- memory
  /// Bytes that the device has; 0: unknown, or the machine's own.
  virtual std::int64_t memory_bytes() const { return 0; }
  /// Of these, bytes that no program holds now; 0: unknown.
  virtual std::int64_t free_memory_bytes() const { return 0; }
  /// Bytes that the backend holds of the device for its ops' own use, beside what allocate() gave.
  virtual std::int64_t workspace_bytes() const { return 0; }
  /// The largest head that attention takes; 0: any.
  virtual std::int64_t most_head_dim() const { return 0; }
  virtual void* allocate(std::size_t bytes) = 0;  // 64-byte aligned, uninitialised; throws std::bad_alloc
  virtual void release(void* data, std::size_t bytes) noexcept = 0;
  virtual void copy_from_host(void* destination, const void* host, std::size_t bytes) = 0;
  virtual void copy_to_host(void* host, const void* source, std::size_t bytes) = 0;
  /// For copies of `bytes`. Without an implementation of its own, begin() is copy_to_host().
  virtual std::unique_ptr<Readback> make_readback(std::size_t bytes);
  virtual void copy(View out, ConstView in) = 0;  // same dtype and size
  /// Rows that are parts of wider ones, side by side: out [rows, width]; `in`, of the same dtype, has a row
  /// every `in_row` elements and ends with the last one.
  virtual void copy_rows(View out, ConstView in, std::int64_t rows, std::int64_t width,
                         std::int64_t in_row) = 0;
  virtual void synchronize() = 0;

  // --- recording a fixed sequence of ops, to launch it as one (CUDA graphs)
  /// Whether begin_capture() works here.
  virtual bool can_capture() const { return false; }
  /// Ops that follow are recorded and do not run; none of them may wait for the device. Allocations before.
  virtual void begin_capture() {}
  virtual std::unique_ptr<CapturedWork> end_capture() { return nullptr; }
  /// Forgets what was recorded: for when an op threw.
  virtual void abandon_capture() noexcept {}

  // --- elementwise and reductions
  virtual void fill(View out, double value) = 0;
  /// Independent normal numbers, a pure function of (seed, stream, index): the same on every backend to
  /// rounding.
  virtual void fill_normal(View out, double stddev, std::uint64_t seed, std::uint64_t stream) = 0;
  /// The same, of a part of the numbers that does not begin with the first, and of streams that captured work
  /// is told when it is launched.
  virtual void fill_normal_from(View out, double stddev, const NormalNumbers& from) = 0;
  virtual void cast(View out, ConstView in) = 0;             // between floating dtypes
  virtual void add(View out, ConstView a, ConstView b) = 0;  // may alias
  virtual void accumulate(View out, ConstView in) = 0;       // out += in
  virtual void scale(View out, double factor) = 0;
  virtual void sum(View out, ConstView in) = 0;  // out: one stat element; the order of the sum is fixed
  virtual void sum_squares(View out, ConstView in) = 0;  // likewise
  virtual std::int64_t count_nonfinite(ConstView in) = 0;

  // --- y = x W^T: x [rows, in], W [out, in], y [rows, out], of the compute dtype; y of the stat dtype for
  // ------------------------------------------------------ scores. All with a leading [batch] (LinearShape).
  /// On the CPU W may be bf16 beside fp32 (forward only), and so may the table of embedding_forward.
  virtual void linear_forward(View y, ConstView x, ConstView w, const LinearShape& s) = 0;
  /// y = base + x W^T, base of y's shape and dtype, and not y: a residual connection in the product that ends
  /// at it. Without an implementation of its own a product and a sum, each rounded to the compute dtype.
  virtual void linear_add_forward(View y, ConstView base, ConstView x, ConstView w, const LinearShape& s);
  /// The same as linear_forward with W of few bits, [batch * out] rows of `in` columns; y is of x's dtype. In
  /// the invariant mode with the bits of linear_forward over scale * code, rounded to the compute dtype.
  virtual void linear_packed_forward(View y, ConstView x, const PackedView& w, const LinearShape& s) = 0;
  /// The same of rows that are codes: y[r][o] = scale_r * sum over W's groups of scale_og * (their codes'
  /// product), which is exact in 32 bits of integer (in < 2^16). x [batch * rows] rows of quantize_rows();
  /// its stride is the format's. What a row becomes depends on no other row, in every mode.
  virtual void linear_codes_forward(View y, const PackedView& x, const PackedView& w,
                                    const LinearShape& s) = 0;
  /// y = base + x W^T of codes, each rounded to y's dtype; base as in linear_add_forward. Without an
  /// implementation of its own a product and a sum, whose bits it has anyway.
  virtual void linear_codes_add_forward(View y, ConstView base, const PackedView& x, const PackedView& w,
                                        const LinearShape& s);
  virtual void linear_backward_input(View dx, ConstView dy, ConstView w, const LinearShape& s) = 0;
  virtual void linear_backward_weight(View dw, ConstView dy, ConstView x, const LinearShape& s) = 0;
  virtual void linear_backward_weight_accumulate(View dw, ConstView dy, ConstView x,
                                                 const LinearShape& s) = 0;

  // --- activations of few bits (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456)
  /// Symmetric, a scale a row, in fp32: scale = max |x| * (clip / (2^(bits-1) - 1)), code = x / scale to the
  /// nearest (ties to even) in -2^(bits-1) .. 2^(bits-1) - 1; a row of zeros has the scale 1. codes uint8
  /// [rows
  /// * row_bytes()] in two's complement, zero behind a row's last column, scales fp32 [rows]. A row that is
  /// not finite has the scale NaN, and so is what a product makes of it.
  virtual void quantize_rows(View codes, View scales, ConstView x, const RowQuantization& s) = 0;
  /// y may be x, where their strides are the same. matrix: H_factor by rows, fp32 of 1 and -1; null where
  /// factor is 1. On a GPU a block has at most as many elements as floats of shared memory (25000 at least).
  virtual void hadamard_forward(View y, ConstView x, ConstView matrix, const HadamardShape& s) = 0;

  /// What `from` says and quantize_rows in one pass, with the bits of those ops one after the other (of a
  /// SwiGLU, swiglu_forward). codes and scales as quantize_rows has them. False: nothing was done, there is
  /// no such pass here, or none for this shape; who asks then calls the ops. InternalError: as those.
  virtual bool make_codes(View codes, View scales, const CodeSource& from, const RowQuantization& s);

  // --- embedding: table [V, D], tokens int32 [rows]
  virtual void embedding_forward(View out, ConstView table, ConstView tokens, std::int64_t rows,
                                 std::int64_t width) = 0;
  virtual void embedding_backward_accumulate(View dtable, ConstView dout, ConstView tokens, std::int64_t rows,
                                             std::int64_t width) = 0;

  // --- RMSNorm (Zhang & Sennrich 2019): y = x * rstd * w, rstd = 1/sqrt(mean(x^2) + eps) [rows]. A weight of
  // less than kLeastNormWeight counts as that much, so that y tells x * rstd.
  virtual void rms_norm_forward(View y, View rstd, ConstView x, ConstView w, const NormShape& s) = 0;
  /// dx is overwritten, dw is added to.
  virtual void rms_norm_backward(View dx, View dw_accumulate, ConstView dy, ConstView x, ConstView w,
                                 ConstView rstd, const NormShape& s) = 0;
  /// h = x + a; y = rms_norm(h). `h` may alias `x` or `a`.
  virtual void add_rms_norm_forward(View h, View y, View rstd, ConstView x, ConstView a, ConstView w,
                                    const NormShape& s) = 0;
  /// dx = da = dh + (gradient of the norm at h); dx may alias dh. dh may be null: nothing else used h.
  virtual void add_rms_norm_backward(View dx, View dw_accumulate, ConstView dh, ConstView dy, ConstView h,
                                     ConstView w, ConstView rstd, const NormShape& s) = 0;
  /// The gradients of both from the norm's output: rms_norm_backward when dh is null, else
  /// add_rms_norm_backward. As exact as y is: x * rstd comes back as y / w. dx may alias dh.
  virtual void rms_norm_backward_from_output(View dx, View dw_accumulate, ConstView dh, ConstView dy,
                                             ConstView y, ConstView w, ConstView rstd,
                                             const NormShape& s) = 0;

  // --- QK-norm (optional) and RoPE (Su et al. 2021), half-split as Llama in Hugging Face
  // --------------------------- qkv, out: [rows, (H+2G)*d]; positions int32 [rows]; q_weight, k_weight [d] or
  // null; rstd stat [rows, H+G], used with QK-norm only. Values pass through. out may alias qkv when there is
  // no QK-norm.
  virtual void rope_forward(View out, View rstd, ConstView qkv, ConstView positions, ConstView q_weight,
                            ConstView k_weight, const QkvShape& s) = 0;
  /// dqkv may alias dout when there is no QK-norm. `qkv` is the input of the forward, read with QK-norm only.
  virtual void rope_backward(View dqkv, View dq_weight_accumulate, View dk_weight_accumulate, ConstView dout,
                             ConstView qkv, ConstView rstd, ConstView positions, ConstView q_weight,
                             ConstView k_weight, const QkvShape& s) = 0;

  // --- causal attention over packed rows, never holding T x T
  // ------------------------------------------------------- qkv [B*T, (H+2G)*d] after RoPE; out [B*T, H*d];
  // lse stat [B, H, T] (natural log of the sum of exponentials). first_key int32 [B*T] or null: the query at
  // t of its sequence sees the keys first_key[t] .. t (indices within the sequence, non-decreasing): document
  // masks, and sequences of different lengths packed into one (batch = 1).
  virtual void attention_forward(View out, View lse, ConstView qkv, ConstView first_key,
                                 const AttentionShape& s) = 0;
  virtual void attention_backward(View dqkv, ConstView dout, ConstView out, ConstView lse, ConstView qkv,
                                  ConstView first_key, const AttentionShape& s) = 0;
  /// first_key[i] = the index, within its sequence, of the first row of the sequence with i's document.
  /// documents int32 [B*T], non-decreasing within a sequence.
  virtual void first_keys(View first_key, ConstView documents, std::int64_t batch, std::int64_t seq) = 0;

  // --- attention over a cache: qkv [rows, (H+2G)*d] after RoPE; pool [blocks * block_elements]; tables int32
  // ------- [sequences, table], the blocks of each sequence in order; sequences int32 [rows], the row of
  // ------- `tables` that is a row's own; lengths int32 [rows], the entries that a row sees, its own last.
  /// Keys and values of the rows to the entries lengths - 1 of their sequences; as codes, keys less
  /// s.key_means. InternalError: bits other than 4, 8 and 16.
  virtual void cache_append(View pool, ConstView qkv, ConstView tables, ConstView sequences,
                            ConstView lengths, const CacheShape& s) = 0;
  /// out [rows, H*d]: each row over its entries, its own as the cache has it too. In the invariant mode with
  /// the bits of attention_forward, where the cache has codes of that over what cache_round_trip leaves.
  virtual void cached_attention(View out, ConstView pool, ConstView qkv, ConstView tables,
                                ConstView sequences, ConstView lengths, const CacheShape& s) = 0;

  /// out = qkv with keys and values as they come back from a cache of s.bits, keys less s.key_means; of the
  /// shape only rows, heads, kv_heads, head_dim, bits and these count. out may alias qkv. InternalError: bits
  /// other than 4 and 8.
  virtual void cache_round_trip(View out, ConstView qkv, const CacheShape& s) = 0;

  /// Entries become what others of the pool are, key and value, bit by bit: of key/value head g, entry to[i]
  /// becomes entry from[g * entries + i]. from int32 [kv_heads, entries], to int32 [entries]: of entry i of
  /// the pool's block b the number b * block + i. No entry is in both. Of the shape the rows, tables and
  /// heads do not count.
  virtual void cache_copy(View pool, ConstView from, ConstView to, std::int64_t entries,
                          const CacheShape& s) = 0;
  /// scores stat [kv_heads, chunks]: of a sequence's first chunks * chunk entries, chunk by chunk, the mean
  /// of their keys times the sum of the group's query heads. query [H*d] after RoPE, table int32 [s.table].
  virtual void cache_chunk_scores(View scores, ConstView pool, ConstView query, ConstView table,
                                  std::int64_t chunks, std::int64_t chunk, const CacheShape& s) = 0;

  /// Chooses for each row of logits [rows, vocab] among the first `choices` ids. Waits for the device. False:
  /// nothing was done, this backend leaves it to the host.
  virtual bool choose_tokens(std::span<TokenPick> picks, ConstView logits, std::int64_t vocab,
                             std::int64_t choices);

  // --- rows of shares: softmax at a temperature, from which tokens are drawn where they lie
  /// Whether rows of logits are better left where they are: their shares are made and asked there.
  virtual bool keeps_rows() const { return false; }
  /// shares fp64 [rows, choices] = softmax(logits / temperature) over the first `choices` ids of each row of
  /// logits [rows, vocab], in fp64 of the logits as they are; all of a row NaN where one of its logits is NaN
  /// or infinite, or all are -infinity (a token that cannot come). A row does not depend on the others.
  virtual void make_shares(View shares, ConstView logits, std::int64_t rows, std::int64_t vocab,
                           std::int64_t choices, double temperature) = 0;
  /// Answers questions about rows of `choices` shares, in fp64 sums of a fixed order. Waits for the device.
  virtual void ask_shares(std::span<ShareQuestion> questions, std::int64_t choices) = 0;

  /// One step of decoding as a whole (decoder.h); null: this backend has no such thing, or none for a model
  /// of this shape. The memory that `model` points to outlives it.
  virtual std::unique_ptr<Decoder> make_decoder(const DecoderModel& model);

  // --- SwiGLU (Shazeer 2020): gate_up [rows, 2F] holds gate then up; h = silu(gate) * up [rows, F]
  virtual void swiglu_forward(View h, ConstView gate_up, std::int64_t rows, std::int64_t hidden) = 0;
  virtual void swiglu_backward(View dgate_up, ConstView dh, ConstView gate_up, std::int64_t rows,
                               std::int64_t hidden) = 0;
  /// The same with h in up's place: gate_h [rows, 2F] holds gate, then h; may alias gate_up. A silu(gate) of
  /// less than kLeastSilu counts as that much, so that h tells up.
  virtual void swiglu_forward_beside_gate(View gate_h, ConstView gate_up, std::int64_t rows,
                                          std::int64_t hidden) = 0;
  /// As exact as h is: up comes back as h / silu(gate). dgate_up may alias gate_h.
  virtual void swiglu_backward_from_output(View dgate_up, ConstView dh, ConstView gate_h, std::int64_t rows,
                                           std::int64_t hidden) = 0;

  // --- h = silu(x + bias): x, h [rows, width], bias [width] (the predictor's hidden layer)
  virtual void bias_silu_forward(View h, ConstView x, ConstView bias, std::int64_t rows,
                                 std::int64_t width) = 0;
  /// dx is overwritten, dbias is added to.
  virtual void bias_silu_backward(View dx, View dbias_accumulate, ConstView dh, ConstView x, ConstView bias,
                                  std::int64_t rows, std::int64_t width) = 0;

  // --- r = x . w (+ bias): one stat scalar a row; x [rows, width], w [width], bias [1] or null
  virtual void row_score_forward(View r, ConstView x, ConstView w, ConstView bias, std::int64_t rows,
                                 std::int64_t width) = 0;
  /// dx += dr w (skipped when dx is null), dw += dr^T x, dbias += sum dr (when not null).
  virtual void row_score_backward_accumulate(View dx, View dw, View dbias, ConstView dr, ConstView x,
                                             ConstView w, std::int64_t rows, std::int64_t width) = 0;

  // --- selection
  /// indices int32 [B*K]: for each sequence the K largest scores [B*T] as b*T + t, ascending; of equal scores
  /// the lower index wins. K = keep.
  virtual void top_k_rows(View indices, ConstView scores, std::int64_t batch, std::int64_t seq,
                          std::int64_t keep) = 0;
  /// Rows with scores > threshold, ascending, into indices (room for B*T) with offsets int32 [B+1] of each
  /// sequence's part. Returns their number (a host synchronisation: evaluation and decoding only).
  virtual std::int64_t select_above(View indices, View offsets, ConstView scores, double threshold,
                                    std::int64_t batch, std::int64_t seq) = 0;

  // --- gather and scatter of rows: out [rows, width], x [source_rows, width]
  virtual void gather_rows_forward(View out, ConstView x, ConstView indices, const GatherShape& s) = 0;
  /// dx[indices[i]] += dout[i]: the indices are unique, so this needs no atomics.
  virtual void gather_rows_backward_accumulate(View dx, ConstView dout, ConstView indices,
                                               const GatherShape& s) = 0;
  virtual void gather_int32(View out, ConstView in, ConstView indices) = 0;

  // --- the routed residual (Raposo et al. 2024, eq. 1): y = x; y[i] += g(r[i]) f for the kept rows i
  // ---------------------- x, y [source_rows, D]; f [rows, D]; r stat [source_rows]. y may alias x.
  virtual void gated_scatter_forward(View y, ConstView x, ConstView f, ConstView r, ConstView indices,
                                     GateKind gate, const GatherShape& s) = 0;
  /// df = g(r_i) dy_i; dr[i] += <dy_i, f> g'(r_i). The gradient of x is dy itself.
  virtual void gated_scatter_backward(View df, View dr_accumulate, ConstView dy, ConstView f, ConstView r,
                                      ConstView indices, GateKind gate, const GatherShape& s) = 0;

  // --- experts: their router's softmax, and rows to their slots and back
  /// affinity stat [choices, rows] = the softmax of each row of logits stat [rows, choices], transposed, so
  /// that each choice has its rows one after the other. lse stat [rows] or null: the log of the sum of
  /// exponentials.
  virtual void expert_affinity_forward(View affinity, View lse, ConstView logits, std::int64_t rows,
                                       std::int64_t choices) = 0;
  /// dlogits [rows, choices] of the compute dtype, with p the affinity: p (dp - sum_e p_e dp_e) + p dlse.
  /// Either gradient may be null.
  virtual void expert_affinity_backward(View dlogits, ConstView daffinity, ConstView dlse, ConstView affinity,
                                        std::int64_t rows, std::int64_t choices) = 0;
  /// scores stat [choices, rows] = logits stat [rows, choices] + bias, transposed as the affinity is. bias
  /// stat [choices] or null.
  virtual void choice_scores_forward(View scores, ConstView logits, ConstView bias, std::int64_t rows,
                                     std::int64_t choices) = 0;
  /// dlogits stat [rows, choices] is overwritten, dbias (when not null) is added to.
  virtual void choice_scores_backward(View dlogits, View dbias_accumulate, ConstView dscores,
                                      std::int64_t rows, std::int64_t choices) = 0;
  /// From indices int32 [E, S], which count through [E, N] (e * N + row): rows int32 [E, S], the row of each
  /// slot, and slots int32 [E, N], the slot (counted through [E, S]) that each row has with each expert; -1:
  /// none.
  virtual void expert_slots(View rows, View slots, ConstView indices, const ExpertShape& s) = 0;
  /// out [E, S, D] = x[rows], zeros for a slot without a row. x [N, D].
  virtual void expert_gather_forward(View out, ConstView x, ConstView rows, const ExpertShape& s) = 0;
  /// dx [N, D] = the sum of dout over each row's slots, in the order of the experts.
  virtual void expert_gather_backward(View dx, ConstView dout, ConstView slots, const ExpertShape& s) = 0;
  /// y [N, D] = the sum over each row's slots of weights[e, row] * f[slot], in the order of the experts;
  /// zeros for a row without slots. f [E, S, D], weights stat [E, N].
  virtual void expert_combine_forward(View y, ConstView f, ConstView weights, ConstView slots,
                                      const ExpertShape& s) = 0;
  /// df[slot] = weights[e, row] dy[row]; dweights[e, row] = <dy[row], f[slot]>, 0 where there is no slot.
  virtual void expert_combine_backward(View df, View dweights, ConstView dy, ConstView f, ConstView weights,
                                       ConstView rows, const ExpertShape& s) = 0;
  /// Token choice: weights stat [choices, rows] are 0 but for the `top_k` choices of largest affinity of each
  /// row (of equal ones the lower). There they are the affinity when top_k is 1 (Fedus et al. 2021), else the
  /// affinity over the sum of those chosen (Lepikhin et al. 2020).
  virtual void token_choice_forward(View weights, ConstView affinity, std::int64_t rows, std::int64_t choices,
                                    std::int64_t top_k) = 0;
  virtual void token_choice_backward(View daffinity, ConstView dweights, ConstView affinity,
                                     ConstView weights, std::int64_t rows, std::int64_t choices,
                                     std::int64_t top_k) = 0;
  /// rows and slots as expert_slots leaves them, from weights stat [E, N]: of each sequence of `seq` rows,
  /// each expert takes the first S * seq / N rows that have a weight above 0. What a row's slot is depends on
  /// no later row.
  virtual void expert_fill(View rows, View slots, ConstView weights, std::int64_t seq,
                           const ExpertShape& s) = 0;
  /// What the metrics say of the experts of a layer, into stat [8]: share of rows without a slot; slots a
  /// row; share of the rows' weights above 0 that have no slot (0 when weights is null: expert choice drops
  /// nothing); slots of the busiest and of the idlest expert, 1 being the mean over experts; the mean
  /// affinity of all choices after the E experts together (no-ops); share of rows whose largest affinity is
  /// one of those; mean entropy of the affinity, nats. affinity stat [choices, N], choices >= E; weights stat
  /// [choices, N] or null.
  virtual void expert_statistics(View out, ConstView affinity, ConstView weights, ConstView slots,
                                 std::int64_t choices, const ExpertShape& s) = 0;

  // --- losses
  /// losses stat [rows] = logsumexp(logits) - logits[target]; a target below 0 has loss 0 and gradient 0.
  /// With `gradient` not null (it may alias logits): gradient = (softmax - onehot) * gradient_scale.
  virtual void cross_entropy(View losses, View gradient, ConstView logits, ConstView targets,
                             std::int64_t rows, std::int64_t vocab, double gradient_scale) = 0;
  /// Binary cross-entropy with logits r stat [rows] against "is among indices" (kept rows): losses stat
  /// [rows], and dr [rows] = (sigmoid(r) - target) * gradient_scale when not null.
  virtual void membership_bce(View losses, View dr, ConstView r, ConstView indices, std::int64_t rows,
                              double gradient_scale) = 0;
  /// Load balance of choices (Fedus et al. 2021, equations 4 to 6), for each sequence alone: losses stat
  /// [rows / seq] = choices * sum_e f_e P_e, with f_e the share of the weights above 0 that are e's and P_e
  /// the mean affinity of e. daffinity [choices, rows], when not null, is its gradient * gradient_scale; f_e
  /// is a constant there.
  virtual void balance_loss(View losses, View daffinity, ConstView affinity, ConstView weights,
                            const SequenceChoices& s, double gradient_scale) = 0;
  /// losses = x^2, dx = 2 x gradient_scale (when not null), all stat: of log-sum-exps, the z-loss (Zoph et
  /// al. 2022).
  virtual void square_loss(View losses, View dx, ConstView x, double gradient_scale) = 0;
  /// What the metrics say of a routed layer, into stat [8]: mean, min and max of r; share of r >
  /// threshold_logit; then, of the decision p > threshold_logit against membership: true positives, positives
  /// decided, members (as shares of rows); the last element is 0. `p` may be r itself.
  virtual void routing_statistics(View out, ConstView r, ConstView p, ConstView indices,
                                  double threshold_logit, std::int64_t rows) = 0;

  // --- optimizer
  /// AdamW (Loshchilov & Hutter 2019) over flat stat arenas; `working`, when not null, gets the compute-dtype
  /// copy. numbers: UpdateNumbers, fp64.
  virtual void adamw(View master, View working, View m, View v, ConstView gradient, ConstView numbers,
                     const AdamWParams& p) = 0;
  /// Whether a step's update is made, and how far its gradients are scaled (step_rule.h): into numbers,
  /// UpdateNumbers of each of the kClipGroups groups, `gradient_scale` and `applied`; into applied, stat [1].
  /// mean: LossMean, which takes the loss of an update that is made; halted says that none is made any more.
  /// losses stat [parts * slots], squares stat [kClipGroups]: sums of squares of the groups' gradients.
  virtual void judge_step(View numbers, View mean, View applied, ConstView losses, ConstView squares,
                          const StepRule& rule) = 0;

  /// The matrix work launched since the last clear().
  FlopLog flop_log;
};

/// The CPU backend for the best instruction set that this processor and this build have. `threads` 0: all
/// cores. FATHOM_ISA=portable|avx2|avx512 in the environment picks another one (UserError if the processor
/// lacks it).
std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options, int threads = 0);

}  // namespace fathom
