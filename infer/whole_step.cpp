#include "infer/whole_step.h"

#include <algorithm>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/model/selection.h"
#include "src/ops/routing.h"

namespace fathom {

namespace {

DecoderLayer layer_of(const Transformer& model, std::int64_t l, const Causal& rule) {
  const ParameterSet& p = model.parameters();
  const auto get = [&](const char* name) -> ConstView {
    return p.get(fmt::format("model.layers.{}.{}", l, name));
  };
  const auto matrix = [&](const char* name) -> DecoderMatrix {
    const std::string full = fmt::format("model.layers.{}.{}", l, name);
    if (p.is_packed(full)) return {{}, p.packed(full).view()};
    return {p.get(full), {}};
  };
  DecoderLayer d;
  d.input_norm = get("input_layernorm.weight");
  d.qkv = matrix("self_attn.qkv_proj.weight");
  if (model.config().qk_norm) {
    d.q_norm = get("self_attn.q_norm.weight");
    d.k_norm = get("self_attn.k_norm.weight");
  }
  if (const Tensor means = model.key_means(l); means.defined()) d.key_means = means;
  d.out = matrix("self_attn.o_proj.weight");
  d.post_norm = get("post_attention_layernorm.weight");
  d.gate_up = matrix("mlp.gate_up_proj.weight");
  d.down = matrix("mlp.down_proj.weight");
  d.routed = model.routing().routes(l);
  if (!d.routed) return d;
  d.router = get("router.weight");
  if (rule.logit == Causal::Logit::Predictor) {
    d.predictor_in = get("router_predictor.0.weight");
    d.predictor_bias = get("router_predictor.0.bias");
    d.predictor_out = get("router_predictor.2.weight");
    d.predictor_last = get("router_predictor.2.bias");
  }
  return d;
}

DecoderModel describe(const Transformer& model, const Causal& rule, const KvCache& cache,
                      std::int64_t choices, std::int64_t most_sequences) {
  const ModelConfig& m = model.config();
  const ParameterSet& p = model.parameters();
  DecoderModel d;
  d.vocab = m.vocab_size;
  d.choices = choices;
  d.width = m.width;
  d.hidden = m.ffn_hidden;
  d.predictor_hidden = model.routing().causal.predictor_hidden;
  d.norm_eps = m.norm_eps;
  d.qkv = {1, m.heads, m.kv_heads, m.head_dim(), m.rope_theta, m.norm_eps, m.rope_scaling};
  d.gate = gate_kind(model.routing().gate);
  d.embedding = p.get("model.embed_tokens.weight");
  d.final_norm = p.get("model.norm.weight");
  d.head = m.tie_embeddings ? d.embedding : ConstView(p.get("lm_head.weight"));
  for (std::int64_t l = 0; l < m.depth; ++l) d.layers.push_back(layer_of(model, l, rule));
  const Quantization* q = model.quantization();
  d.transforms_heads = q != nullptr && q->online.queries_keys;
  d.cache = cache.shape();
  d.cache.stride = cache.pool().width();
  d.pool = cache.memory();
  d.most_blocks = (m.max_seq_len + cache.block() - 1) / cache.block() + 1;
  d.slots = most_sequences;
  d.most_rows = most_sequences;
  return d;
}

}  // namespace

std::unique_ptr<WholeStep> WholeStep::open(Context& c, const Transformer& model, const Causal& rule,
                                           KvCache& cache, std::int64_t choices,
                                           std::int64_t most_sequences) {
  // Its rows are numbers, and it transforms nothing that a product reads. What weights, keys and values may
  // be is the backend's to say.
  const Quantization* q = model.quantization();
  const bool is_plain = q == nullptr || (q->activations == 16 && !q->online.down && !q->online.heads);
  if (model.routing().has_experts() || !is_plain) return nullptr;
  std::unique_ptr<Decoder> decoder =
      c.backend().make_decoder(describe(model, rule, cache, choices, most_sequences));
  if (decoder == nullptr) return nullptr;
  const auto tables = 1 + static_cast<std::int64_t>(model.routed_layers().size());
  return std::unique_ptr<WholeStep>(new WholeStep(cache, std::move(decoder), rule.threshold, most_sequences,
                                                  tables, model.config().vocab_size));
}

WholeStep::WholeStep(KvCache& cache, std::unique_ptr<Decoder> decoder, double threshold, std::int64_t slots,
                     std::int64_t tables, std::int64_t vocab)
    : cache_(cache),
      decoder_(std::move(decoder)),
      threshold_(threshold),
      slots_(static_cast<std::size_t>(slots)),
      tables_(tables),
      vocab_(vocab) {}

// The sequence's own; else one whose sequence is gone; else the one that has waited longest. There are as
// many as rows of a step at least, and none of this step is taken away.
std::int64_t WholeStep::slot_of(SequenceId id) {
  std::size_t best = 0;
  const auto rank = [&](const Slot& s) {
    return s.sequence < 0 || !cache_.has(s.sequence) ? std::int64_t{-1} : s.used;
  };
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].sequence == id) return static_cast<std::int64_t>(i);
    if (rank(slots_[i]) < rank(slots_[best])) best = i;
  }
  slots_[best] = {id, 0, std::vector<std::int64_t>(static_cast<std::size_t>(tables_), 0)};
  return static_cast<std::int64_t>(best);
}

// Where the row's entries go. What one that follows another adds is an entry behind those of a row that is
// not over: one more in dense layers, perhaps one more in routed ones.
DecoderRow WholeStep::place(const StepRow& row, const std::vector<std::int32_t>& entries) {
  const std::int64_t ahead = row.follows < 0 ? 0 : 1;
  const std::int64_t held = cache_.tokens(row.sequence) + ahead;
  cache_.reserve(row.sequence, 1 + ahead);
  const std::int64_t number = slot_of(row.sequence);
  Slot& slot = slots_[static_cast<std::size_t>(number)];
  slot.used = steps_;
  for (std::int64_t table = 0; table < tables_; ++table) {
    const std::span<const std::int32_t> blocks = cache_.blocks(row.sequence, table);
    std::int64_t& known = slot.known[static_cast<std::size_t>(table)];
    const std::int64_t before = table == 0 ? held : entries[static_cast<std::size_t>(table - 1)] + ahead;
    decoder_->set_blocks(number, table, known, blocks.subspan(static_cast<std::size_t>(known)),
                         before > known * cache_.block());
    known = static_cast<std::int64_t>(blocks.size());
  }
  return {.slot = number,
          .token = row.token,
          .position = static_cast<std::int32_t>(row.position),
          .held = static_cast<std::int32_t>(held),
          .entries = entries.data(),
          .follows = row.follows,
          .threshold = ops::fp32_below(logit(row.threshold.value_or(threshold_))),
          .temperature = row.temperature,
          .uniform = uniform(row.seed, static_cast<std::uint64_t>(row.position + 1)),
          .wants_share = row.wants_share};
}

void WholeStep::launch(std::span<const StepRow> rows) {
  ++steps_;
  std::vector<std::vector<std::int32_t>> entries;
  entries.reserve(rows.size());
  std::vector<DecoderRow> to;
  to.reserve(rows.size());
  for (const StepRow& row : rows) {
    entries.push_back(cache_.routed_entries(row.sequence));
    to.push_back(place(row, entries.back()));
  }
  under_way_.emplace_back(rows.begin(), rows.end());
  try {
    decoder_->launch(to);
  } catch (...) {
    under_way_.pop_back();
    throw;
  }
}

std::vector<DecoderResult> WholeStep::wait() {
  const std::size_t rows = under_way_.front().size();
  under_way_.pop_front();
  std::vector<DecoderResult> results = decoder_->wait();
  if (results.size() != rows) throw InternalError("[whole step] the results are another step's");
  if (under_way_.empty()) return results;
  for (StepRow& row : under_way_.front()) {
    if (row.follows < 0) continue;
    const DecoderResult& before = results[static_cast<std::size_t>(row.follows)];
    row.token = before.finite ? before.token : -1;
  }
  return results;
}

std::int32_t WholeStep::find(const StepRow& row) const {
  if (under_way_.empty()) return -1;
  const std::vector<StepRow>& rows = under_way_.front();
  const auto found = std::find_if(rows.begin(), rows.end(), [&](const StepRow& r) {
    return r.sequence == row.sequence && r.position == row.position && r.token == row.token;
  });
  return found == rows.end() ? -1 : static_cast<std::int32_t>(found - rows.begin());
}

void WholeStep::give_up() {
  while (is_under_way()) wait();
}

std::vector<DecoderResult> WholeStep::run(std::span<const StepRow> rows) {
  give_up();
  launch(rows);
  std::vector<DecoderResult> results = wait();
  for (std::size_t i = 0; i < rows.size(); ++i) cache_.commit(rows[i].sequence, results[i].kept);
  return results;
}

std::vector<float> WholeStep::logits(std::int64_t i) {
  std::vector<float> values(static_cast<std::size_t>(vocab_));
  decoder_->logits(i, values);
  return values;
}

}  // namespace fathom
