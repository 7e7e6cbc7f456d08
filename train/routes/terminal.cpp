// The picture for a terminal.
#include <algorithm>
#include <array>
#include <cmath>

#include <fmt/format.h>

#include "src/core/units.h"
#include "train/routes/figures.h"
#include "train/routes/picture.h"

namespace fathom::routes {

namespace {

constexpr std::string_view kDigits = ".123456789abcdefghijklmnopqrstuvwxyz";
constexpr std::string_view kMargin = "  ";

struct Rgb {
  double r, g, b;
};

// From dark to light in equal steps to the eye, for colour-blind readers too (viridis, by Smith and van der
// Walt).
Rgb ramp(double share) {
  constexpr std::array<Rgb, 5> stops{
      Rgb{68, 1, 84}, {59, 82, 139}, {33, 145, 140}, {94, 201, 98}, {253, 231, 37}};
  const double at = std::clamp(share, 0.0, 1.0) * static_cast<double>(stops.size() - 1);
  const auto i = std::min(static_cast<std::size_t>(at), stops.size() - 2);
  const double t = at - static_cast<double>(i);
  const auto mix = [t](double a, double b) { return a + t * (b - a); };
  const Rgb &a = stops.at(i), &b = stops.at(i + 1);
  return {mix(a.r, b.r), mix(a.g, b.g), mix(a.b, b.b)};
}

// The escape sequence that sets background and ink; both, as the terminal may be light or dark.
std::string shade(double share, Colours colours) {
  const Rgb c = ramp(share);
  const bool light = 0.299 * c.r + 0.587 * c.g + 0.114 * c.b > 128;
  if (colours == Colours::Rgb) {
    return fmt::format("\x1b[48;2;{:.0f};{:.0f};{:.0f};38;2;{}m", c.r, c.g, c.b,
                       light ? "0;0;0" : "255;255;255");
  }
  const auto step = [](double v) { return static_cast<int>(std::lround(v / 255.0 * 5.0)); };  // of the cube
  return fmt::format("\x1b[48;5;{};38;5;{}m", 16 + 36 * step(c.r) + 6 * step(c.g) + step(c.b),
                     light ? 16 : 231);
}

constexpr const char* kPlain = "\x1b[0m";

std::int64_t depth_of(const Piece& piece, const std::vector<std::int64_t>& depths) {
  return *std::max_element(depths.begin() + static_cast<std::ptrdiff_t>(piece.first),
                           depths.begin() + static_cast<std::ptrdiff_t>(piece.last));
}

double share_of(std::int64_t depth, std::int64_t deepest) {
  return deepest > 1 ? static_cast<double>(depth - 1) / static_cast<double>(deepest - 1) : 1.0;
}

// What stands for a piece: a line end is shown, and is one.
std::string shown(const Piece& piece) { return printable(piece.text); }
bool ends_line(const Piece& piece) { return !piece.mark && piece.text.ends_with('\n'); }

std::string coloured(const Picture& p, Colours colours) {
  const std::vector<std::int64_t> depths = p.routes.depths();
  const std::int64_t deepest = p.routes.deepest();
  std::string out;
  for (const Piece& piece : p.pieces) {
    const auto at = static_cast<std::int64_t>(piece.first);
    if (at > 0 && at % p.routes.seq_len == 0) out += "\n\n";
    const std::int64_t depth = depth_of(piece, depths);
    out += depth == 0 ? shown(piece) : shade(share_of(depth, deepest), colours) + shown(piece) + kPlain;
    if (ends_line(piece)) out += "\n";
  }
  return out + "\n";
}

// Lines of text, each with a line below it that has each piece's depth under its first letter.
std::string with_digits(const Picture& p, std::size_t columns) {
  const std::vector<std::int64_t> depths = p.routes.depths();
  const std::size_t room = std::max<std::size_t>(columns, 20) - kMargin.size();
  std::string out, text, digits;
  std::size_t width = 0;
  const auto end_line = [&] {
    if (width == 0) return;
    digits.resize(digits.find_last_not_of(' ') + 1);
    out += fmt::format("{0}{1}\n{0}{2}\n\n", kMargin, text, digits);
    text.clear();
    digits.clear();
    width = 0;
  };
  for (const Piece& piece : p.pieces) {
    const auto at = static_cast<std::int64_t>(piece.first);
    if (at > 0 && at % p.routes.seq_len == 0) {
      end_line();
      out += "\n";
    }
    const std::string letters = shown(piece);
    const std::size_t wide = columns_of(letters);
    if (width + wide > room) end_line();
    const std::size_t spaces = std::min(letters.find_first_not_of(' '), letters.size() - 1);
    const auto depth = static_cast<std::size_t>(depth_of(piece, depths));
    text += letters;
    digits.resize(width + spaces, ' ');
    digits += depth < kDigits.size() ? kDigits[depth] : '+';
    width += wide;
    digits.resize(std::max(width, digits.size()), ' ');
    if (ends_line(piece)) end_line();
  }
  end_line();
  return out;
}

const char* unit_of(const Routes& r) {
  return r.routed.empty() ? "the experts of all layers that computed it"
                          : "the routed layers that computed it";
}

std::string legend(const Picture& p, Colours colours) {
  const std::int64_t deepest = p.routes.deepest();
  if (colours == Colours::None) {
    return fmt::format("Below each token: {} ('.': none{}).\n", unit_of(p.routes),
                       deepest > 9 ? ", a: 10, b: 11, ..." : "");
  }
  std::string out = fmt::format("Behind each token: {}:  0 ", unit_of(p.routes));
  constexpr std::int64_t kSwatches = 16;
  const std::int64_t step = (deepest + kSwatches - 1) / kSwatches;
  for (std::int64_t d = 1; d <= deepest; d += std::max<std::int64_t>(step, 1))
    out += fmt::format(" {} {} {}", shade(share_of(d, deepest), colours), d, kPlain);
  return out + "\n";
}

std::string router_lines(const Picture& p) {
  if (p.routes.routed.empty()) return "";
  const bool predicts = !p.routes.routed.front().predicted.empty();
  std::string out = fmt::format(
      "{:>5}  {:>14}  {:>8}  {:>13}{}  {:>8}  {:>8}  {:>8}\n", "layer", "computed", "share", "router says",
      predicts ? fmt::format("  {:>14}", "predictor says") : "", "r mean", "min", "max");
  for (const RoutedTokens& layer : p.routes.routed) {
    const RouterFigures f = figures_of(layer, p.threshold);
    out += fmt::format(
        "{:>5}  {:>14}  {:>8}  {:>13}{}  {:>8.3f}  {:>8.3f}  {:>8.3f}\n", f.layer,
        fmt::format("{} of {}", f.kept, layer.kept.size()), format_percent(f.share), format_percent(f.above),
        predicts ? fmt::format("  {:>14}", format_percent(*f.predicted_above)) : "", f.mean, f.min, f.max);
  }
  return out + fmt::format("says: share of the tokens with sigma(logit) > {:g}\n", p.threshold);
}

std::string expert_lines(const Picture& p) {
  if (p.routes.experts.empty()) return "";
  const ExpertFigures first = figures_of(p.routes.experts.front());
  const bool noops = p.routes.experts.front().noops > 0;
  std::string out = fmt::format("{}{:>5}  {:>7}  {:>11}  {:>9}", p.routes.routed.empty() ? "" : "\n", "layer",
                                "tokens", "experts/tok", "no expert");
  if (first.dropped) out += fmt::format("  {:>8}", "dropped");
  if (noops) out += fmt::format("  {:>14}  {:>11}", "no-op affinity", "no-op first");
  if (noops && first.noop_chosen) out += fmt::format("  {:>12}", "no-op chosen");
  out += "  tokens of each expert\n";
  for (const ExpertTokens& layer : p.routes.experts) {
    const ExpertFigures f = figures_of(layer);
    out += fmt::format("{:>5}  {:>7}  {:>11.2f}  {:>9}", f.layer, f.reached, f.experts_a_token,
                       format_percent(f.without_expert));
    if (f.dropped) out += fmt::format("  {:>8}", format_percent(*f.dropped));
    if (noops)
      out += fmt::format("  {:>14}  {:>11}", format_percent(f.noop_affinity), format_percent(f.noop_first));
    if (noops && f.noop_chosen) out += fmt::format("  {:>12}", format_percent(*f.noop_chosen));
    out += fmt::format("  {}\n", fmt::join(f.load, " "));
  }
  return out;
}

}  // namespace

std::string tokens_in_words(const Picture& p) {
  const auto n = static_cast<std::int64_t>(p.routes.tokens.size());
  if (n == p.available) return fmt::format("{} tokens", n);
  const std::string from = p.first > 0 ? fmt::format(", from token {} on,", with_commas(p.first)) : "";
  return fmt::format("{} of {} tokens{}", n, with_commas(p.available), from);
}

std::string rule_in_words(const Picture& p) {
  const Routes& r = p.routes;
  const bool tokens_choose = r.routed.empty() && !r.experts.front().chosen.empty();
  if (p.rule == "causal" && tokens_choose)
    return "causally: an expert has room for every token that chooses it";
  if (p.rule == "causal")
    return fmt::format("causally: each token by itself, sigma(logit) > {:g}", p.threshold);
  if (p.rule == "stochastic") return "at random, the control: the top-k of noise";
  if (tokens_choose) return "as in training: a token chooses its experts, while they have room";
  return "as in training: the best tokens of each sequence, which looks ahead";
}

std::string terminal_text(const Picture& p, Colours colours, std::size_t columns) {
  const Routes& r = p.routes;
  std::string out =
      fmt::format("{}: {} in {} {}, routed {}\n\n", p.checkpoint, tokens_in_words(p), r.sequences(),
                  r.sequences() == 1 ? "sequence" : "sequences", rule_in_words(p));
  out += colours == Colours::None ? with_digits(p, columns) : coloured(p, colours) + "\n";
  return out + legend(p, colours) + "\n" + router_lines(p) + expert_lines(p);
}

}  // namespace fathom::routes
