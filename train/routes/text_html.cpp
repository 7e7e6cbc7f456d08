// The text in HTML, shaded by depth or by layer.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "train/report/html.h"
#include "train/routes/picture.h"

namespace fathom::routes {

namespace {

using report::escape;

constexpr std::int64_t kSwatches = 12;

std::string experts_in_words(const ExpertTokens& layer, std::size_t i) {
  if (layer.reached[i] == 0) return "";
  std::string taken, dropped;
  for (std::size_t e = 0; e < static_cast<std::size_t>(layer.experts); ++e) {
    const std::size_t at = e * layer.reached.size() + i;
    if (layer.taken[at] != 0)
      taken += fmt::format("{}{} ({:.2f})", taken.empty() ? "" : ", ", e, layer.affinity[at]);
    else if (!layer.chosen.empty() && layer.chosen[at] != 0)
      dropped += fmt::format("{}{}", dropped.empty() ? "" : ", ", e);
  }
  std::string out = taken.empty() ? "no expert" : "expert " + taken;
  if (!dropped.empty()) out += ", no room with " + dropped;
  return out;
}

// What is said of one token: a line for itself, and a clause for each layer that decided on it.
std::string about(const Picture& p, const Piece& piece, std::size_t i) {
  const Routes& r = p.routes;
  const auto at = static_cast<std::int64_t>(i);
  std::string out =
      fmt::format("{}  token {}, position {}", piece.mark ? piece.text : "\"" + printable(piece.text) + "\"",
                  r.tokens[i], at % r.seq_len);
  for (std::int64_t layer = 0; layer < r.blocks; ++layer) {
    std::string said;
    for (const RoutedTokens& l : r.routed) {
      if (l.layer == layer)
        said = fmt::format("{}, r {:.3f}", l.kept[i] != 0 ? "computed" : "passed by", l.scores[i]);
    }
    for (const ExpertTokens& l : r.experts) {
      const std::string experts = l.layer == layer ? experts_in_words(l, i) : "";
      if (!experts.empty()) said += (said.empty() ? "" : ", ") + experts;
    }
    if (!said.empty()) out += fmt::format("\nlayer {}: {}", layer, said);
  }
  return out;
}

// A way to shade the text: a share of full colour for each token.
struct View {
  std::string name;
  std::vector<double> shares;
};

std::vector<View> views_of(const Routes& r) {
  std::vector<View> views;
  for (const RoutedTokens& layer : r.routed)
    views.push_back({fmt::format("layer {}", layer.layer), {layer.kept.begin(), layer.kept.end()}});
  for (const ExpertTokens& layer : r.experts) {
    std::vector<double> shares;
    for (std::size_t i = 0; i < layer.reached.size(); ++i)
      shares.push_back(static_cast<double>(layer.experts_of(i)));
    const double most = std::max(1.0, *std::max_element(shares.begin(), shares.end()));
    for (double& s : shares) s /= most;
    views.push_back({fmt::format("{} {}", r.routed.empty() ? "layer" : "experts of", layer.layer), shares});
  }
  return views;
}

// Full colour's share for a share of the depth: the least that is not nothing is to be seen.
double tint(double share) { return share > 0 ? 0.2 + 0.8 * share : 0; }

double largest(const std::vector<double>& shares, const Piece& piece) {
  double out = 0;
  for (std::size_t i = piece.first; i < piece.last; ++i) out = std::max(out, shares[i]);
  return out;
}

std::string span_of(const Picture& p, const Piece& piece, const std::vector<View>& views) {
  std::string style, title;
  for (std::size_t v = 0; v < views.size(); ++v) {
    const double share = largest(views[v].shares, piece);
    if (share > 0)
      style += fmt::format("{}--{}:{:.2g}", style.empty() ? "" : ";", v == 0 ? "d" : fmt::format("v{}", v),
                           tint(share));
  }
  for (std::size_t i = piece.first; i < piece.last; ++i)
    title += (title.empty() ? "" : "\n") + about(p, piece, i);
  std::string out = piece.mark ? "<span class=\"t mark\"" : "<span class=\"t\"";
  if (!style.empty()) out += " style=\"" + style + "\"";
  const bool line_end = piece.text == "\n";  // otherwise without a sign of its colour
  return out + " title=\"" + escape(title) + "\">" + (line_end ? "\xE2\x86\xB5\n" : escape(piece.text)) +
         "</span>";
}

std::string legend_of(const Routes& r) {
  const std::int64_t deepest = r.deepest(),
                     step = std::max<std::int64_t>(1, (deepest + kSwatches - 1) / kSwatches);
  std::string out = fmt::format("<p class=\"note depths\">{}: ",
                                r.routed.empty() ? "Experts that computed a token, of all layers together"
                                                 : "Routed layers that computed a token");
  for (std::int64_t d = 0; d <= deepest; d += step) {
    out += fmt::format("<span class=\"t\" style=\"--d:{:.2g}\">{}</span>",
                       tint(static_cast<double>(d) / std::max(1.0, static_cast<double>(deepest))), d);
  }
  return out + "</p>\n";
}

}  // namespace

std::string text_html(const Picture& p, const std::string& id) {
  const Routes& r = p.routes;
  std::vector<View> views{{"all layers", {}}};
  const double deepest = static_cast<double>(std::max<std::int64_t>(1, r.deepest()));
  for (const std::int64_t depth : r.depths())
    views.front().shares.push_back(static_cast<double>(depth) / deepest);
  for (View& view : views_of(r)) views.push_back(std::move(view));

  std::string rules, out = "<fieldset class=\"routes\"><legend>Shaded by</legend>\n";
  for (std::size_t v = 0; v < views.size(); ++v) {
    out += fmt::format(
        "<input class=\"pick\" type=\"radio\" name=\"{0}\" id=\"{0}-{1}\"{2}/><label "
        "for=\"{0}-{1}\">{3}</label>\n",
        id, v, v == 0 ? " checked" : "", views[v].name);
    if (v > 0) rules += fmt::format("#{}-{}:checked~.tokens .t{{--a:var(--v{},0)}}\n", id, v, v);
  }
  out += legend_of(r) + "<style>" + rules + "</style>\n<div class=\"tokens\" lang=\"\">";
  for (const Piece& piece : p.pieces) {
    const auto at = static_cast<std::int64_t>(piece.first);
    if (at > 0 && at % r.seq_len == 0)
      out += fmt::format("<span class=\"next\">sequence {}</span>", at / r.seq_len + 1);
    out += span_of(p, piece, views);
  }
  return out + "</div>\n</fieldset>\n";
}

// One stop of the Tab key for the text, arrows within it; what is said of a token stands below.
std::string arrow_keys() {
  return R"js(<script>
for (const text of document.querySelectorAll('.tokens')) {
  const tokens = [...text.querySelectorAll('.t')];
  const about = document.createElement('output');
  about.className = 'about';
  about.textContent = 'Point at a token, or go through the text with the arrow keys: what each layer did with it stands here.';
  text.after(about);
  const show = token => {
    about.textContent = token.title;
    for (const other of tokens) other.tabIndex = other === token ? 0 : -1;
  };
  tokens.forEach((token, i) => {
    token.tabIndex = i ? -1 : 0;
    token.addEventListener('mouseenter', () => { about.textContent = token.title; });
    token.addEventListener('focus', () => show(token));
    token.addEventListener('keydown', event => {
      const to = {ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tokens.length - 1}[event.key];
      if (to === undefined || !tokens[to]) return;
      event.preventDefault();
      tokens[to].focus();
    });
  });
}
</script>
)js";
}

}  // namespace fathom::routes
