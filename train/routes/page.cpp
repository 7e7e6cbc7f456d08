// The page: the text, heat maps, histograms, loads.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "src/core/units.h"
#include "src/model/selection.h"
#include "train/report/html.h"
#include "train/report/svg_chart.h"
#include "train/report/svg_heat_map.h"
#include "train/report/svg_histogram.h"
#include "train/routes/figures.h"
#include "train/routes/picture.h"

namespace fathom::routes {

namespace {

using report::escape;
using report::Table;

constexpr std::int64_t kMaps = 4;  // sequences that have a heat map of their own

constexpr const char* kClosed = "</div>\n<div style=\"height:16px\"></div>\n";  // of charts above a table

// Facts in a sentence or two.
std::string summary(const Picture& p) {
  const Routes& r = p.routes;
  const std::vector<std::int64_t> depths = r.depths();
  const auto n = static_cast<double>(depths.size());
  const auto with = [&](std::int64_t depth) {
    return static_cast<double>(std::count(depths.begin(), depths.end(), depth));
  };
  std::string out;
  if (!r.routed.empty()) {
    out = fmt::format(
        "{} of {} blocks are routed. {:.0f} of {:.0f} tokens ({}) passed all of them by, {:.0f} ({}) went "
        "through all. ",
        r.routed.size(), r.blocks, with(0), n, format_percent(with(0) / n), with(r.deepest()),
        format_percent(with(r.deepest()) / n));
  }
  if (!r.experts.empty()) {
    double taken = 0, alone = 0, reached = 0;
    for (const ExpertTokens& layer : r.experts) {
      const ExpertFigures f = figures_of(layer);
      const auto tokens = static_cast<double>(f.reached);
      taken += f.experts_a_token * tokens;
      alone += f.without_expert * tokens;
      reached += tokens;
    }
    out += fmt::format(
        "Of the {} experts of a layer, {:.2f} computed a token on average; {} of the tokens of a layer had "
        "none.",
        r.experts.front().experts, reached > 0 ? taken / reached : 0,
        format_percent(reached > 0 ? alone / reached : 0));
  }
  return "<p class=\"verdict\">" + out + "</p>\n";
}

std::string router_histogram(const RoutedTokens& layer, const std::vector<double>& logits, double threshold,
                             const char* what, const std::string& note) {
  report::Histogram h;
  h.title = fmt::format("Layer {}: {}", layer.layer, what);
  h.note = note;
  h.x_label = "logit";
  h.y_label = "tokens";
  h.parts = {{"computed", 0, {}}, {"passed by", 1, {}}};
  for (std::size_t i = 0; i < logits.size(); ++i)
    h.parts[layer.kept[i] != 0 ? 0 : 1].values.push_back(logits[i]);
  h.mark = logit(threshold);
  h.mark_label = fmt::format("\xCF\x83 = {:g}", threshold);
  return render(h);
}

std::string router_table(const Picture& p) {
  const bool predicts = !p.routes.routed.front().predicted.empty();
  Table t{.head = {"Layer", "computed", "share", "router says yes"}, .rows = {}};
  if (predicts) t.head.emplace_back("predictor says yes");
  t.head.insert(t.head.end(), {"r mean", "r min", "r max"});
  for (const RoutedTokens& layer : p.routes.routed) {
    const RouterFigures f = figures_of(layer, p.threshold);
    std::vector<std::string> row{std::to_string(f.layer), fmt::format("{} of {}", f.kept, layer.kept.size()),
                                 format_percent(f.share), format_percent(f.above)};
    if (predicts) row.push_back(format_percent(*f.predicted_above));
    for (const double r : {f.mean, f.min, f.max}) row.push_back(fmt::format("{:.3f}", r));
    t.rows.push_back(std::move(row));
  }
  return render(t);
}

// `heading` is the tag of its title.
std::string router_figures(const Picture& p, const char* heading) {
  if (p.routes.routed.empty()) return "";
  std::string out = fmt::format("<{0}>Router weights</{0}>\n<div class=\"charts\">\n", heading);
  for (const RoutedTokens& layer : p.routes.routed) {
    const RouterFigures f = figures_of(layer, p.threshold);
    const auto note = [&](const char* of, double above) {
      return fmt::format("{} of the tokens have \xCF\x83({}) > {:g}; {} were computed.",
                         format_percent(above), of, p.threshold, format_percent(f.share));
    };
    out += router_histogram(layer, layer.scores, p.threshold, "router weights r", note("r", f.above));
    if (!layer.predicted.empty())
      out += router_histogram(layer, layer.predicted, p.threshold, "the predictor's logits",
                              note("logit", *f.predicted_above));
  }
  return out + kClosed + router_table(p);
}

std::string load_bars(const Routes& r) {
  report::BarChart c;
  c.title = "Load of the experts";
  c.note = "The share of the tokens that reached the layer that each expert computed; a bar an expert.";
  c.category = "layer";
  c.y_label = "share of tokens";
  for (std::int64_t e = 0; e < r.experts.front().experts; ++e) {
    report::BarSeries s;
    s.name = fmt::format("expert {}", e);
    s.colour = static_cast<int>(e);
    for (const ExpertTokens& layer : r.experts) {
      const ExpertFigures f = figures_of(layer);
      if (f.reached == 0) continue;
      s.bars.emplace_back(layer.layer, static_cast<double>(f.load[static_cast<std::size_t>(e)]) /
                                           static_cast<double>(f.reached));
    }
    c.series.push_back(std::move(s));
  }
  return render(c);
}

std::string affinity_histogram(const ExpertTokens& layer) {
  const std::size_t n = layer.reached.size();
  report::Histogram h;
  h.title = fmt::format("Layer {}: affinities", layer.layer);
  h.x_label = "affinity, a softmax over the choices of a token";
  h.y_label = "choices of all tokens";
  h.parts = {{"expert computed the token", 0, {}}, {"expert did not", 1, {}}};
  if (layer.noops > 0) h.parts.push_back({"no-op", 3, {}});
  for (std::size_t e = 0; e < static_cast<std::size_t>(layer.experts + layer.noops); ++e) {
    for (std::size_t i = 0; i < n; ++i) {
      const bool noop = e >= static_cast<std::size_t>(layer.experts);
      const std::size_t part = noop ? 2 : layer.taken[e * n + i] != 0 ? 0 : 1;
      h.parts[part].values.push_back(layer.affinity[e * n + i]);
    }
  }
  return render(h);
}

std::string expert_table(const Routes& r) {
  const ExpertFigures first = figures_of(r.experts.front());
  const bool noops = r.experts.front().noops > 0;
  Table t{.head = {"Layer", "tokens", "experts a token", "tokens without"}, .rows = {}};
  if (first.dropped) t.head.emplace_back("choices dropped");
  if (noops) t.head.insert(t.head.end(), {"affinity for no-ops", "no-op first"});
  if (noops && first.noop_chosen) t.head.emplace_back("choices of no-ops");
  t.head.emplace_back("busiest expert");
  t.head.emplace_back("idlest expert");
  for (const ExpertTokens& layer : r.experts) {
    const ExpertFigures f = figures_of(layer);
    std::vector<std::string> row{std::to_string(f.layer), std::to_string(f.reached),
                                 fmt::format("{:.2f}", f.experts_a_token), format_percent(f.without_expert)};
    if (f.dropped) row.push_back(format_percent(*f.dropped));
    if (noops) row.insert(row.end(), {format_percent(f.noop_affinity), format_percent(f.noop_first)});
    if (noops && f.noop_chosen) row.push_back(format_percent(*f.noop_chosen));
    const auto [low, high] = std::minmax_element(f.load.begin(), f.load.end());
    for (const auto e : {high, low}) row.push_back(fmt::format("{}: {} tokens", e - f.load.begin(), *e));
    t.rows.push_back(std::move(row));
  }
  return render(t);
}

std::string expert_figures(const Routes& r, const char* heading) {
  if (r.experts.empty()) return "";
  std::string out = fmt::format("<{0}>Experts</{0}>\n<div class=\"charts\">\n", heading) + load_bars(r);
  for (const ExpertTokens& layer : r.experts) out += affinity_histogram(layer);
  return out + kClosed + expert_table(r);
}

template <typename Value>
std::vector<double> part_of(const Routes& r, std::int64_t sequence, const Value& value) {
  std::vector<double> out;
  const auto first = static_cast<std::size_t>(sequence * r.seq_len);
  const std::size_t last = std::min(r.tokens.size(), first + static_cast<std::size_t>(r.seq_len));
  for (std::size_t i = first; i < last; ++i) out.push_back(value(i));
  return out;
}

std::string depth_map(const Routes& r, std::int64_t sequence, const std::string& where) {
  report::HeatMap m;
  m.title = "Which blocks computed each token" + where;
  m.note = "Grey: blocks that compute every token.";
  for (std::int64_t layer = 0; layer < r.blocks; ++layer) {
    const auto router = std::find_if(r.routed.begin(), r.routed.end(),
                                     [layer](const RoutedTokens& l) { return l.layer == layer; });
    const bool routed = router != r.routed.end();
    m.rows.push_back({std::to_string(layer),
                      part_of(r, sequence, [&](std::size_t i) { return routed ? router->kept[i] : 1.0; }),
                      !routed});
  }
  m.x_label = "position in the sequence";
  m.y_label = "layer";
  return render(m);
}

std::string expert_map(const Routes& r, std::int64_t sequence, const std::string& where) {
  report::HeatMap m;
  m.title = "How many experts computed each token" + where;
  std::int64_t most = 1;
  for (const ExpertTokens& layer : r.experts)
    for (std::size_t i = 0; i < layer.reached.size(); ++i) most = std::max(most, layer.experts_of(i));
  for (const ExpertTokens& layer : r.experts) {
    m.rows.push_back({std::to_string(layer.layer), part_of(r, sequence, [&](std::size_t i) {
                        return static_cast<double>(layer.experts_of(i)) / static_cast<double>(most);
                      })});
  }
  m.note = fmt::format("Full colour: {} {}. Empty: none.", most, most == 1 ? "expert" : "experts");
  m.x_label = "position in the sequence";
  m.y_label = "layer";
  return render(m);
}

std::string heat_maps(const Picture& p) {
  const Routes& r = p.routes;
  std::string out = "<div class=\"charts\">\n";
  for (std::int64_t s = 0; s < std::min(kMaps, r.sequences()); ++s) {
    const std::string where =
        r.sequences() > 1 ? fmt::format(", sequence {} of {}", s + 1, r.sequences()) : "";
    if (!r.routed.empty()) out += depth_map(r, s, where);
    if (!r.experts.empty()) out += expert_map(r, s, where);
  }
  return out + "</div>\n";
}

}  // namespace

std::string report_section(std::span<const ReportedRun> runs) {
  if (runs.empty()) return "";
  std::string out = "<h2>Which tokens went deep</h2>\n";
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const ReportedRun& run = runs[i];
    if (!run.picture) {
      out += fmt::format("<p class=\"note\">{}: not drawn. {}</p>\n", escape(run.name), escape(run.why_not));
      continue;
    }
    const Picture& p = *run.picture;
    out += fmt::format(
        "<details{}><summary>{}: {} of its validation text, step {}</summary>\n<p "
        "class=\"sub\">Routed {}.</p>\n",
        i == 0 ? " open" : "", escape(run.name), tokens_in_words(p), p.step, escape(rule_in_words(p)));
    out += summary(p) + text_html(p, fmt::format("shade{}", i)) + heat_maps(p) + router_figures(p, "h3") +
           expert_figures(p.routes, "h3") + "</details>\n";
  }
  return out;
}

std::string page(const Picture& p) {
  const Routes& r = p.routes;
  const std::string title = "Routes of " + p.name;
  std::string body =
      fmt::format("<header>\n<h1>{}</h1>\n<p class=\"sub\">{}, step {}. {} in {} {}. Routed {}.</p>\n",
                  escape(title), escape(p.checkpoint), p.step, tokens_in_words(p), r.sequences(),
                  r.sequences() == 1 ? "sequence" : "sequences", escape(rule_in_words(p)));
  body += summary(p) + "</header>\n<h2>Which tokens went deep</h2>\n" + text_html(p, "shade");
  body += "<h2>Layers by positions</h2>\n" + heat_maps(p) + router_figures(p, "h2") + expert_figures(r, "h2");
  body +=
      "<footer>As figure 5 of Raposo et al. 2024, Mixture-of-Depths (arXiv 2404.02258). Of a character of "
      "several tokens the deepest is shown. fathom routes --csv writes every number of this page.</footer>\n";
  return report::page(title, body + arrow_keys());
}

}  // namespace fathom::routes
