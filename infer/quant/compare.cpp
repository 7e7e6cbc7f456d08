#include "infer/quant/compare.h"

#include <algorithm>
#include <map>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

namespace {

/// Layer, and whether it is of experts.
using Decider = std::pair<std::int64_t, bool>;
/// Of each decider, for each expert and row of the batch, whether it is taken.
using Decisions = std::map<Decider, std::vector<bool>>;

struct Pass {
  double loss = 0;  // summed over rows
  Decisions decisions;
};

Pass pass(Context& c, const Transformer& model, const SelectionRule& rule, const Batch& batch) {
  const ForwardResult result = model.forward(c, batch, rule);
  const auto rows = static_cast<std::size_t>(batch.batch * batch.seq);
  Pass p;
  for (const double loss : to_doubles(c.backend(), model.cross_entropy(c, result.hidden, batch.targets, 1)))
    p.loss += loss;
  std::map<std::int64_t, std::vector<std::int32_t>> kept;
  for (const RoutedLayer& routed : result.routing) {
    std::vector<bool>& taken = p.decisions[{routed.layer, false}];
    taken.resize(rows);
    kept[routed.layer] = to_host<std::int32_t>(c.backend(), routed.indices);
    for (const std::int32_t row : kept[routed.layer]) taken[static_cast<std::size_t>(row)] = true;
  }
  for (const ExpertLayer& layer : result.experts) {
    std::vector<bool>& taken = p.decisions[{layer.layer, true}];
    taken.resize(rows * static_cast<std::size_t>(layer.dispatch.shape.experts));
    const auto slots = static_cast<std::size_t>(layer.dispatch.shape.slots);
    const std::vector<std::int32_t> of_slots = to_host<std::int32_t>(c.backend(), layer.dispatch.rows);
    const auto block = kept.find(layer.layer);
    for (std::size_t slot = 0; slot < of_slots.size(); ++slot) {
      if (of_slots[slot] < 0) continue;
      auto row = static_cast<std::size_t>(of_slots[slot]);
      if (block != kept.end()) row = static_cast<std::size_t>(block->second[row]);
      taken[slot / slots * rows + row] = true;
    }
  }
  return p;
}

constexpr std::int64_t kPassTokens =
    4096;  // sequences side by side: a pass of one is mostly launches and waiting

struct Counts {
  std::int64_t before = 0, after = 0, flipped = 0;
};

}  // namespace

ModelComparison compare_models(Context& c, const Transformer& before, const Transformer& after,
                               const ComparedRules& rules, std::span<const std::int32_t> tokens,
                               std::int64_t seq) {
  const NoGrad no_grad(c);
  if (seq < 1 || std::ssize(tokens) <= seq)
    throw InternalError(fmt::format("[compare] {} tokens are no sequence of {} and one", tokens.size(), seq));
  ModelComparison result;
  std::map<Decider, Counts> counts;
  const std::int64_t sequences = (std::ssize(tokens) - 1) / seq,
                     most = std::max<std::int64_t>(1, kPassTokens / seq);
  for (std::int64_t done = 0; done < sequences; done += most) {
    const std::int64_t together = std::min(most, sequences - done), size = together * seq;
    const auto at = tokens.begin() + done * seq;
    const Batch batch = make_batch(c, together, seq, {at, at + size}, {at + 1, at + size + 1});
    const Pass was = pass(c, before, rules.before, batch), is = pass(c, after, rules.after, batch);
    result.tokens += size;
    result.loss_before += was.loss;
    result.loss_after += is.loss;
    // A block that kept no token has no experts' decisions.
    const auto of = [](const Pass& p, const Decider& d, std::size_t i) {
      const auto found = p.decisions.find(d);
      return found != p.decisions.end() && found->second[i];
    };
    Decisions any = was.decisions;
    any.insert(is.decisions.begin(), is.decisions.end());
    for (const auto& [decider, decisions] : any) {
      Counts& n = counts[decider];
      for (std::size_t i = 0; i < decisions.size(); ++i) {
        const bool b = of(was, decider, i), a = of(is, decider, i);
        n.before += b ? 1 : 0;
        n.after += a ? 1 : 0;
        n.flipped += a != b ? 1 : 0;
      }
    }
  }
  result.loss_before /= static_cast<double>(result.tokens);
  result.loss_after /= static_cast<double>(result.tokens);
  for (const auto& [decider, n] : counts) {
    const std::int64_t experts = decider.second ? before.routing().experts.count : 1;
    const auto share = [&](std::int64_t of) {
      return static_cast<double>(of) / static_cast<double>(result.tokens * experts);
    };
    result.decisions.push_back(
        {decider.first, decider.second, share(n.before), share(n.after), share(n.flipped)});
  }
  return result;
}

}  // namespace fathom
