#include "infer/speculate/short_passes.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <string_view>

#include "kernels/capture.h"
#include "kernels/error.h"
#include "src/ops/routing.h"

namespace fathom {

namespace {

/// The cache of one sequence, whose tables somebody else fills in.
class FixedTables final : public AttentionCache {
 public:
  FixedTables(const KvCache& cache, const Tensor& table, const Tensor& sequences, const Tensor& lengths)
      : cache_(cache), table_(table), sequences_(sequences), lengths_(lengths) {}

  void expect(Context&, std::int64_t, const Tensor&) override {
    throw InternalError("[short pass] a routed block");
  }
  Tensor attend(Context& c, std::int64_t layer, const Tensor& qkv, const Tensor&) override {
    CacheShape s = cache_.dense_shape(layer);
    s.rows = qkv.dim(0);
    s.sequences = 1;
    s.table = table_.size();
    if (queries.defined()) c.backend().copy(queries.rows(layer, layer + 1), qkv.rows(s.rows - 1, s.rows));
    Tensor out = c.empty({s.rows, s.heads * s.head_dim});
    const Tensor& pool = cache_.memory();
    c.backend().cache_append(pool, qkv, table_, sequences_, lengths_, s);
    c.backend().cached_attention(out, pool, qkv, table_, sequences_, lengths_, s);
    c.check("cached_attention", "", out);
    return out;
  }

  Tensor queries;  // [layers, (H+2G)d], of the last row; undefined: nobody wants them

 private:
  const KvCache& cache_;
  Tensor table_, sequences_, lengths_;
};

std::int64_t most_blocks(const Transformer& model, const KvCache& cache) {
  return (model.config().max_seq_len + cache.block() - 1) / cache.block() + 1;
}

}  // namespace

struct ShortPasses::Pass {
  std::int64_t rows, wanted;
  Tensor inputs;  // tokens, positions, sequences and lengths of the rows, then the sequence's blocks
  Tensor at;      // the rows that are wanted
  Batch batch;
  std::unique_ptr<FixedTables> cache;
  Tensor logits;
  bool is_warm = false;
  std::unique_ptr<CapturedWork> work;
};

std::unique_ptr<ShortPasses> ShortPasses::open(Context& c, const Transformer& model, const Causal& rule,
                                               KvCache& cache, bool unrecorded) {
  const bool asks = !model.routed_layers().empty() && rule.blocks != Causal::Blocks::Skipped;
  if (asks || model.routing().has_experts() || model.quantization() != nullptr) return nullptr;
  const char* given = std::getenv("FATHOM_FEW_ROWS");  // 0: to measure what they bring (docs/speculation.md)
  const bool wanted = given == nullptr || std::string_view(given) != "0";
  if (!unrecorded && !(wanted && c.backend().can_capture())) return nullptr;
  return std::unique_ptr<ShortPasses>(new ShortPasses(c, model, rule, cache));
}

ShortPasses::ShortPasses(Context& c, const Transformer& model, const Causal& rule, KvCache& cache)
    : c_(c), model_(model), rule_(rule), cache_(cache), pool_(c.allocator().pool()) {}

ShortPasses::~ShortPasses() = default;

ShortPasses::Pass& ShortPasses::pass_of(std::int64_t rows, std::int64_t wanted, bool watched) {
  std::unique_ptr<Pass>& found = passes_[{rows, wanted, watched}];
  if (found) return *found;
  auto made = std::make_unique<Pass>();
  Pass& p = *made;
  p.rows = rows;
  p.wanted = wanted;
  p.inputs = c_.empty({4 * rows + most_blocks(model_, cache_)}, DType::I32, MemoryTag::Data);
  p.at = c_.empty({wanted}, DType::I32, MemoryTag::Data);
  std::vector<std::int32_t> last(static_cast<std::size_t>(wanted));
  std::iota(last.begin(), last.end(), static_cast<std::int32_t>(rows - wanted));
  from_host(c_.backend(), p.at, last);
  const auto part = [&](std::int64_t i) { return p.inputs.rows(i * rows, (i + 1) * rows); };
  p.batch.batch = 1;
  p.batch.seq = rows;
  p.batch.tokens = part(0);
  p.batch.positions = part(1);
  p.batch.documents = part(2);  // zeros, which nobody reads
  p.cache = std::make_unique<FixedTables>(cache_, p.inputs.rows(4 * rows, p.inputs.size()), part(2), part(3));
  p.batch.cache = p.cache.get();
  if (watched) {
    const ModelConfig& m = model_.config();
    p.cache->queries = c_.empty({m.depth, (m.heads + 2 * m.kv_heads) * m.head_dim()});
  }
  found = std::move(made);
  return *found;
}

void ShortPasses::compute(Pass& p) {
  const ForwardResult result = model_.forward(c_, p.batch, rule_);
  p.logits = model_.logits(c_, ops::gather_rows(c_, result.hidden, p.at));
}

Tensor ShortPasses::run(SequenceId id, std::span<const std::int32_t> tokens, std::int64_t position,
                        std::int64_t wanted) {
  const auto rows = std::ssize(tokens);
  const NoGrad no_grad(c_);
  Pass& p = pass_of(rows, wanted, cache_.watches(id));
  const std::int64_t before = cache_.tokens(id);
  cache_.extend(id, rows);
  std::vector<std::int32_t> inputs(static_cast<std::size_t>(p.inputs.size()), 0);
  auto to = std::copy(tokens.begin(), tokens.end(), inputs.begin());
  std::iota(to, to + rows, static_cast<std::int32_t>(position));
  to += 2 * rows;  // and the number of the only sequence, 0
  std::iota(to, to + rows, static_cast<std::int32_t>(before + 1));
  to += rows;
  const std::span<const std::int32_t> blocks = cache_.blocks(id, 0);
  if (std::ssize(blocks) > inputs.end() - to) throw InternalError("[short pass] more blocks than a text has");
  std::copy(blocks.begin(), blocks.end(), to);
  from_host(c_.backend(), p.inputs, inputs);
  const Tensor& queries = p.cache->queries;
  if (queries.defined()) cache_.leave_queries(c_, id, queries);
  // The first one makes every choice and every block of memory that the others need.
  if (p.work == nullptr) {
    const MemoryScope memory(c_, pool_);
    if (p.is_warm && c_.backend().can_capture()) {
      p.work = capture(c_.backend(), [&] { compute(p); });
    } else {
      compute(p);
      p.is_warm = true;
    }
  }
  if (p.work != nullptr) p.work->launch();
  if (queries.defined()) cache_.set_queries(id, queries);
  return p.logits;
}

}  // namespace fathom
