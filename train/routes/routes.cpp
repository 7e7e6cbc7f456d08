#include "train/routes/routes.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom::routes {

namespace {

// One sequence of the text: tokens [first, first + seq).
struct Window {
  std::size_t first = 0;
  std::size_t seq = 0;
  std::size_t tokens = 0;  // of the whole text
};

void place(const std::vector<double>& values, const Window& w, std::vector<double>& out) {
  std::copy(values.begin(), values.end(), out.begin() + static_cast<std::ptrdiff_t>(w.first));
}

void keep(Backend& backend, const RoutedLayer& layer, const Window& w, RoutedTokens& out) {
  place(to_doubles(backend, layer.scores), w, out.scores);
  if (layer.predicted.defined()) {
    out.predicted.resize(w.tokens);
    place(to_doubles(backend, layer.predicted), w, out.predicted);
  }
  for (const std::int32_t row : to_host<std::int32_t>(backend, layer.indices))
    out.kept[w.first + static_cast<std::size_t>(row)] = 1;
}

// A block's experts see the rows that the block computes: all, or those that its router kept.
void keep(Backend& backend, const ExpertLayer& layer, const std::vector<std::int32_t>& rows, const Window& w,
          ExpertTokens& out) {
  const std::vector<double> affinity = to_doubles(backend, layer.affinity);
  const std::vector<std::int32_t> slots = to_host<std::int32_t>(backend, layer.dispatch.slots);
  const std::vector<double> weights =
      layer.weights.defined() ? to_doubles(backend, layer.weights) : std::vector<double>();
  const auto experts = static_cast<std::size_t>(out.experts);
  const std::size_t choices = experts + static_cast<std::size_t>(out.noops), n = rows.size();
  for (std::size_t j = 0; j < n; ++j) {
    const std::size_t token = w.first + static_cast<std::size_t>(rows[j]);
    out.reached[token] = 1;
    for (std::size_t e = 0; e < choices; ++e) {
      out.affinity[e * w.tokens + token] = affinity[e * n + j];
      if (e < experts && slots[e * n + j] >= 0) out.taken[e * w.tokens + token] = 1;
      if (!weights.empty() && weights[e * n + j] > 0) out.chosen[e * w.tokens + token] = 1;
    }
  }
}

std::vector<std::int32_t> first_numbers(std::size_t n) {
  std::vector<std::int32_t> rows(n);
  for (std::size_t i = 0; i < n; ++i) rows[i] = static_cast<std::int32_t>(i);
  return rows;
}

Routes empty_routes(const Transformer& model, const Excerpt& excerpt) {
  const std::size_t n = excerpt.tokens.size();
  Routes r;
  r.blocks = model.config().depth;
  r.seq_len = excerpt.seq_len;
  r.tokens = excerpt.tokens;
  for (const std::int64_t layer : model.routed_layers())
    r.routed.push_back({layer, std::vector<double>(n), {}, std::vector<std::uint8_t>(n)});
  const ExpertsConfig& config = model.routing().experts;
  const auto experts = static_cast<std::size_t>(config.count);
  const std::size_t choices = experts + static_cast<std::size_t>(config.noop);
  for (const std::int64_t layer : model.expert_layers()) {
    r.experts.push_back({layer, config.count, config.noop, std::vector<std::uint8_t>(n),
                         std::vector<double>(choices * n, std::nan("")),
                         std::vector<std::uint8_t>(experts * n),
                         std::vector<std::uint8_t>(model.routing().tokens_choose() ? choices * n : 0)});
  }
  return r;
}

}  // namespace

Excerpt excerpt_of(const TokenStore& store, std::int64_t first, std::int64_t tokens, std::int64_t seq_len,
                   bool document_mask) {
  Excerpt e;
  e.seq_len = seq_len;
  e.tokens.resize(static_cast<std::size_t>(std::clamp<std::int64_t>(store.num_tokens() - first, 0, tokens)));
  store.read(first, e.tokens);
  if (!document_mask) return e;
  const auto starts = store.document_starts();
  std::size_t document = 0;
  for (std::int64_t i = first; i < first + static_cast<std::int64_t>(e.tokens.size()); ++i) {
    while (starts[document + 1] <= i) ++document;
    e.documents.push_back(static_cast<std::int32_t>(document));
  }
  return e;
}

std::int64_t ExpertTokens::experts_of(std::size_t i) const {
  std::int64_t sum = 0;
  for (std::size_t at = i; at < taken.size(); at += reached.size()) sum += taken[at];
  return sum;
}

std::vector<std::int64_t> Routes::depths() const {
  std::vector<std::int64_t> depth(tokens.size());
  for (std::size_t i = 0; i < depth.size(); ++i) {
    for (const RoutedTokens& layer : routed) depth[i] += layer.kept[i];
    if (!routed.empty()) continue;
    for (const ExpertTokens& layer : experts) depth[i] += layer.experts_of(i);
  }
  return depth;
}

std::int64_t Routes::deepest() const {
  if (!routed.empty()) return static_cast<std::int64_t>(routed.size());
  const std::vector<std::int64_t> depth = depths();
  return depth.empty() ? 0 : *std::max_element(depth.begin(), depth.end());
}

void require_routing(const Transformer& model, const std::string& name) {
  if (model.routing().kind != RoutingKind::None) return;
  throw UserError(
      fmt::format("{} has no routed layers and no experts (routing.kind: none): each of its blocks computes "
                  "every token, so there is nothing to draw.",
                  name),
      "Give a run that was trained with routing.kind mod, moe, mode_staged or mode_integrated.");
}

Routes trace(Context& c, const Transformer& model, const Excerpt& excerpt, const SelectionRule& rule) {
  if (excerpt.tokens.empty()) throw UserError("The text is empty: it has no tokens to route.");
  const NoGrad no_grad(c);
  Routes r = empty_routes(model, excerpt);
  const std::size_t n = excerpt.tokens.size();
  for (std::size_t first = 0; first < n; first += static_cast<std::size_t>(excerpt.seq_len)) {
    const Window w{first, std::min(static_cast<std::size_t>(excerpt.seq_len), n - first), n};
    const auto part = [&](const std::vector<std::int32_t>& all) {
      if (all.empty()) return all;
      const auto begin = all.begin() + static_cast<std::ptrdiff_t>(first);
      return std::vector<std::int32_t>(begin, begin + static_cast<std::ptrdiff_t>(w.seq));
    };
    const Batch batch =
        make_batch(c, 1, static_cast<std::int64_t>(w.seq), part(r.tokens), {}, part(excerpt.documents));
    const ForwardResult pass = model.forward(c, batch, rule);
    for (std::size_t i = 0; i < pass.routing.size(); ++i) keep(c.backend(), pass.routing[i], w, r.routed[i]);
    for (const ExpertLayer& layer : pass.experts) {  // a block that kept nothing has none
      const auto router = std::find_if(pass.routing.begin(), pass.routing.end(),
                                       [&](const RoutedLayer& l) { return l.layer == layer.layer; });
      const std::vector<std::int32_t> rows = router == pass.routing.end()
                                                 ? first_numbers(w.seq)
                                                 : to_host<std::int32_t>(c.backend(), router->indices);
      keep(c.backend(), layer, rows, w, r.experts[static_cast<std::size_t>(layer.layer)]);
    }
  }
  return r;
}

}  // namespace fathom::routes
