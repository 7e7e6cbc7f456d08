#include "train/isoflop/paper_claims.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "src/config/scalar.h"
#include "train/isoflop/compare.h"
#include "train/isoflop/depth_test.h"

namespace fathom::isoflop {
namespace {

constexpr double kSame = 1.25;  // two FLOP counts within this factor are called the same

std::string percent(double share) { return fmt::format("{:+.2f} %", 100 * share); }

std::string with_interval(const Estimate& e, const std::function<std::string(double)>& format) {
  std::string text = std::isfinite(e.value) ? format(e.value) : "no figure";
  if (e.interval) text += fmt::format(" [{}, {}]", format(e.interval->low), format(e.interval->high));
  return text;
}

// Two curves at one budget.
struct Pair {
  std::size_t other = 0, base = 0;
  double budget = 0;
  std::array<std::size_t, 2> both() const { return {other, base}; }
};

class Tester {
 public:
  Tester(const Fit& fit, std::span<const Row> rows) : fit_(fit), rows_(rows) {}

  std::vector<PaperClaim> run() {
    const std::string dense = first_of("none");
    for (const std::string& family : of_kind({"mod"})) {
      if (dense.empty()) continue;
      larger(family, dense);
      lower_loss(family, dense);
      trend(family, dense);
      faster_steps(family, dense);
      same_flops(family, dense);
    }
    for (const std::string& family : of_kind({"mod"})) depth_first(family);
    beats("beats_stochastic", "Learned routing beats random routing at equal training FLOPs.", {"mod"},
          "stochastic");
    beats("compounds", "MoDE compounds the gains of MoD with those of MoE: it is lower in loss than MoE.",
          {"mode_staged", "mode_integrated"}, "moe");
    return std::move(claims_);
  }

 private:
  std::vector<std::string> of_kind(std::initializer_list<const char*> kinds) const {
    std::vector<std::string> names;
    for (const Curve& c : fit_.curves) {
      const bool wanted = std::any_of(kinds.begin(), kinds.end(), [&](const char* k) { return c.kind == k; });
      if (wanted && std::find(names.begin(), names.end(), c.family) == names.end()) names.push_back(c.family);
    }
    return names;
  }
  std::string first_of(const char* kind) const {
    const std::vector<std::string> names = of_kind({kind});
    return names.empty() ? "" : names.front();
  }

  // Usable pairs of judged curves, ascending in budget.
  std::vector<Pair> pairs(const std::string& other, const std::string& base) const {
    std::vector<Pair> out;
    for (std::size_t i = 0; i < fit_.curves.size(); ++i) {
      for (std::size_t j = 0; j < fit_.curves.size(); ++j) {
        const Curve &a = fit_.curves[i], &b = fit_.curves[j];
        if (a.family != other || b.family != base || !a.judged || !b.judged || a.budget != b.budget) continue;
        if (a.minimum && b.minimum && a.minimum->usable && b.minimum->usable) out.push_back({i, j, a.budget});
      }
    }
    std::sort(out.begin(), out.end(), [](const Pair& x, const Pair& y) { return x.budget < y.budget; });
    return out;
  }

  std::string why_no_pair(const std::string& other, const std::string& base) const {
    std::string why;
    for (const Curve& c : fit_.curves) {
      if ((c.family != other && c.family != base) || !c.judged || c.flags.empty()) continue;
      why += fmt::format("{}{} at {}: {}", why.empty() ? "" : "; ", c.family, print_number(c.budget),
                         c.flags.front());
    }
    return why.empty() ? "the two families share no budget" : why;
  }

  // The claim `id` about the largest budget, with the figure that `figure` gives for a pair; nothing to test
  // when there is no pair.
  PaperClaim* start(const char* id, const std::string& family, const std::string& claim,
                    const std::string& base, Pair& at) {
    claims_.push_back(
        {.id = id, .family = family, .claim = claim, .figure = "", .estimate = {NAN, {}}, .why = ""});
    const std::vector<Pair> all = pairs(family, base);
    if (all.empty()) {
      claims_.back().why = why_no_pair(family, base);
      return nullptr;
    }
    at = all.back();
    return &claims_.back();
  }

  // Held when the interval is below (or above) `limit`.
  static void judge(PaperClaim& c, double limit, bool below) {
    if (!c.estimate.interval) {
      c.why = "the noise is unknown: more sizes or seeds are needed";
      return;
    }
    const Interval i = *c.estimate.interval;
    if (below ? i.high < limit : i.low > limit) {
      c.verdict = Verdict::Held;
    } else if (below ? i.low > limit : i.high < limit) {
      c.verdict = Verdict::NotHeld;
    } else {
      c.why = "the interval reaches both sides";
    }
  }

  void larger(const std::string& family, const std::string& dense) {
    Pair at;
    PaperClaim* c =
        start("larger", family, "The optimal MoD is larger than the optimal baseline.", dense, at);
    if (c == nullptr) return;
    const auto total = [](const Row& r) {
      return std::optional<double>(static_cast<double>(r.params_total - r.params_embedding));
    };
    c->estimate = ratio_at_minima(at, total);
    c->figure = fmt::format("{} the parameters at {} FLOPs", with_interval(c->estimate, times), budget(at));
    judge(*c, 1, false);
  }

  void lower_loss(const std::string& family, const std::string& dense) {
    Pair at;
    PaperClaim* c =
        start("lower_loss", family,
              "The optimal MoD is lower in loss at equal training FLOPs (by up to 1.5 %).", dense, at);
    if (c == nullptr) return;
    c->estimate = gap(at);
    c->figure = fmt::format("{} in loss at {} FLOPs", with_interval(c->estimate, percent), budget(at));
    judge(*c, 0, true);
  }

  // Not the paper's, and what a small sweep can say about larger ones.
  void trend(const std::string& family, const std::string& dense) {
    PaperClaim c{
        .id = "gap_trend",
        .family = family,
        .claim = "Beside the paper: relative to the baseline, the loss of the MoD falls as compute grows.",
        .figure = "",
        .estimate = {NAN, {}},
        .why = ""};
    const std::vector<Pair> all = pairs(family, dense);
    std::vector<std::size_t> curves;
    for (const Pair& p : all) curves.insert(curves.end(), {p.other, p.base});
    if (all.size() < 2) {
      c.why = "usable minima of both families at two budgets are needed";
    } else {
      c.estimate = compare(fit_, curves, [&](const Sample& s) { return slope_of_gaps(all, s); }).estimate;
      c.figure = fmt::format("{} points for ten times the FLOPs, over {} budgets",
                             with_interval(c.estimate, percent), all.size());
      judge(c, 0, true);
    }
    claims_.push_back(std::move(c));
  }

  void faster_steps(const std::string& family, const std::string& dense) {
    Pair at;
    PaperClaim* c =
        start("steps_faster", family,
              "A MoD equal in loss to the optimal baseline steps faster (by up to 60 %).", dense, at);
    if (c == nullptr) return;
    const auto step = comparable_steps(rows_);
    const Curve &mod = fit_.curves[at.other], &base = fit_.curves[at.base];
    const std::array<std::size_t, 2> both = at.both();
    const Compared r = compare(fit_, both, [&](const Sample& s) -> std::optional<double> {
      const CurvePoint best = s.lowest(at.base);
      const std::optional<double> x = first_at(s[at.other], best.y, mod.low, mod.high);
      if (!x) return std::nullopt;
      const std::optional<double> slow = along(base, rows_, best.x, step), fast = along(mod, rows_, *x, step);
      return slow && fast ? std::optional(*slow / *fast - 1) : std::nullopt;
    });
    c->estimate = r.estimate;
    c->figure =
        std::isfinite(r.estimate.value)
            ? fmt::format("{} steps a second at {} FLOPs", with_interval(r.estimate, percent), budget(at))
            : fmt::format("no size reaches the baseline's loss at {} FLOPs", budget(at));
    // Where the loss is out of reach in nearly every replicate, the claim fails for want of such a model.
    const double missing = 0.5 * (1 - fit_.options.level) * static_cast<double>(r.replicates);
    if (r.replicates > 0 && static_cast<double>(r.defined) < missing && !std::isfinite(r.estimate.value)) {
      c->verdict = Verdict::NotHeld;
      c->estimate.interval.reset();
    } else if (static_cast<double>(r.replicates - r.defined) > missing || !std::isfinite(r.estimate.value)) {
      c->why = fmt::format("a size that reaches the baseline's loss is there in {} of {} replicates",
                           r.defined, r.replicates);
      c->estimate.interval.reset();
    } else {
      judge(*c, 0, false);
    }
  }

  void same_flops(const std::string& family, const std::string& dense) {
    Pair at;
    PaperClaim* c =
        start("same_forward_flops", family,
              "The optimal MoD costs as many FLOPs a forward pass as the optimal baseline.", dense, at);
    if (c == nullptr) return;
    c->estimate =
        ratio_at_minima(at, [](const Row& r) { return std::optional<double>(r.flops_per_token_forward); });
    c->figure =
        fmt::format("{} the FLOPs a token at {} FLOPs", with_interval(c->estimate, times), budget(at));
    if (!c->estimate.interval) return judge(*c, 1, true);
    const Interval i = *c->estimate.interval;
    if (i.low >= 1 / kSame && i.high <= kSame) {
      c->verdict = Verdict::Held;
    } else if (i.high < 1 / kSame || i.low > kSame) {
      c->verdict = Verdict::NotHeld;
    } else {
      c->why = fmt::format("the interval reaches both sides of {:.2f} or {:.2f}", 1 / kSame, kSame);
    }
  }

  void depth_first(const std::string& family) {
    const DepthTest t = test_depth(fit_, rows_, family);
    PaperClaim c{.id = "depth_before_width",
                 .family = family,
                 .claim = "More depth is worth more than more width at the same size.",
                 .figure = "",
                 .estimate = t.effect,
                 .why = t.why};
    if (t.why.empty()) {
      c.figure = fmt::format("{} nats for ten times the depth over width, at the same size and budget",
                             with_interval(c.estimate, [](double x) { return fmt::format("{:+.4f}", x); }));
      judge(c, 0, true);
    }
    claims_.push_back(std::move(c));
  }

  // One claim a family of `kinds`, against the first family of kind `than`.
  void beats(const char* id, const std::string& claim, std::initializer_list<const char*> kinds,
             const char* than) {
    const std::vector<std::string> families = of_kind(kinds);
    const std::string other = first_of(than);
    if (families.empty() || other.empty()) {
      claims_.push_back({.id = id,
                         .family = "",
                         .claim = claim,
                         .figure = "",
                         .estimate = {NAN, {}},
                         .why = fmt::format("the sweep has no finished cells of the kinds {} and {}",
                                            fmt::join(kinds, ", "), than)});
      return;
    }
    for (const std::string& family : families) {
      Pair at;
      PaperClaim* c = start(id, family, claim, other, at);
      if (c == nullptr) continue;
      c->estimate = gap(at);
      c->figure = fmt::format("{} in loss against {} at {} FLOPs", with_interval(c->estimate, percent), other,
                              budget(at));
      judge(*c, 0, true);
    }
  }

  static std::optional<double> gap_in(const Pair& p, const Sample& s) {
    return s.lowest(p.other).y / s.lowest(p.base).y - 1;
  }
  Estimate gap(const Pair& p) const {
    const std::array<std::size_t, 2> both = p.both();
    return compare(fit_, both, [&](const Sample& s) { return gap_in(p, s); }).estimate;
  }
  Estimate ratio_at_minima(const Pair& p, const std::function<std::optional<double>(const Row&)>& of) const {
    const std::array<std::size_t, 2> both = p.both();
    return compare(fit_, both,
                   [&](const Sample& s) -> std::optional<double> {
                     const auto a = along(fit_.curves[p.other], rows_, s.lowest(p.other).x, of);
                     const auto b = along(fit_.curves[p.base], rows_, s.lowest(p.base).x, of);
                     return a && b ? std::optional(*a / *b) : std::nullopt;
                   })
        .estimate;
  }
  // Per factor of ten in FLOPs, by least squares.
  static std::optional<double> slope_of_gaps(const std::vector<Pair>& all, const Sample& s) {
    double mx = 0, my = 0, sxy = 0, sxx = 0;
    const auto n = static_cast<double>(all.size());
    for (const Pair& p : all) {
      mx += std::log10(p.budget) / n;
      my += *gap_in(p, s) / n;
    }
    for (const Pair& p : all) {
      const double dx = std::log10(p.budget) - mx;
      sxx += dx * dx;
      sxy += dx * (*gap_in(p, s) - my);
    }
    return sxy / sxx;
  }

  static std::string times(double x) { return fmt::format("{:.2f}x", x); }
  static std::string budget(const Pair& p) { return print_number(p.budget); }

  const Fit& fit_;
  std::span<const Row> rows_;
  std::vector<PaperClaim> claims_;
};

}  // namespace

const char* name_of(Verdict verdict) {
  switch (verdict) {
    case Verdict::Held:
      return "held";
    case Verdict::NotHeld:
      return "not held";
    case Verdict::NotTestable:
      return "not testable here";
  }
  return "";
}

std::vector<PaperClaim> test_claims(const Fit& fit, std::span<const Row> rows) {
  return Tester(fit, rows).run();
}

std::string claims_text(std::span<const PaperClaim> claims) {
  std::string text;
  for (const PaperClaim& c : claims) {
    text +=
        fmt::format("{}{}: {}\n  {}\n", c.family.empty() ? "" : c.family + ": ", name_of(c.verdict), c.claim,
                    c.figure.empty() ? c.why
                    : c.why.empty()  ? c.figure
                                     : c.figure + "; " + c.why);
  }
  return text;
}

std::string claims_json(std::span<const PaperClaim> claims) {
  using Json = nlohmann::ordered_json;
  Json list = Json::array();
  for (const PaperClaim& c : claims) {
    const auto& i = c.estimate.interval;
    list.push_back({{"id", c.id},
                    {"family", c.family},
                    {"claim", c.claim},
                    {"verdict", name_of(c.verdict)},
                    {"figure", c.figure},
                    {"value", std::isfinite(c.estimate.value) ? Json(c.estimate.value) : Json(nullptr)},
                    {"low", i ? Json(i->low) : Json(nullptr)},
                    {"high", i ? Json(i->high) : Json(nullptr)},
                    {"why", c.why}});
  }
  return list.dump();
}

}  // namespace fathom::isoflop
