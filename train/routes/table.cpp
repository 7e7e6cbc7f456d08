// The routes as CSV and as JSON.
#include <cmath>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "train/report/csv.h"
#include "train/routes/figures.h"
#include "train/routes/picture.h"

namespace fathom::routes {

namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kHead =
    "sequence,position,token,text,layer,score,predicted,kept,experts,affinities,noop_affinity,dropped";

std::string number(double value) { return std::isfinite(value) ? fmt::format("{:.7g}", value) : ""; }

// The columns of one token in one layer, after the token's own.
std::string cells(std::int64_t layer, const RoutedTokens* router, const ExpertTokens* experts,
                  std::size_t i) {
  std::string names, affinities, dropped;
  double noop = 0;
  const bool reached = experts != nullptr && experts->reached[i] != 0;
  for (std::size_t e = 0; reached && e < static_cast<std::size_t>(experts->experts + experts->noops); ++e) {
    const std::size_t at = e * experts->reached.size() + i;
    const bool is_noop = e >= static_cast<std::size_t>(experts->experts);
    if (is_noop) {
      noop += experts->affinity[at];
    } else if (experts->taken[at] != 0) {
      names += fmt::format("{}{}", names.empty() ? "" : " ", e);
      affinities += (affinities.empty() ? "" : " ") + number(experts->affinity[at]);
    } else if (!experts->chosen.empty() && experts->chosen[at] != 0) {
      dropped += fmt::format("{}{}", dropped.empty() ? "" : " ", e);
    }
  }
  const std::string score = router != nullptr ? number(router->scores[i]) : "";
  const std::string predicted =
      router != nullptr && !router->predicted.empty() ? number(router->predicted[i]) : "";
  return fmt::format("{},{},{},{},{},{},{},{}", layer, score, predicted,
                     router == nullptr || router->kept[i] != 0 ? 1 : 0, names, affinities,
                     reached && experts->noops > 0 ? number(noop) : "", dropped);
}

template <typename Layer>
const Layer* of_layer(const std::vector<Layer>& layers, std::int64_t layer) {
  for (const Layer& l : layers)
    if (l.layer == layer) return &l;
  return nullptr;
}

}  // namespace

// A token that is one byte of a character has the whole character's text, as the pictures show it.
std::string csv(const Picture& picture) {
  const Routes& r = picture.routes;
  std::string out = std::string(kHead) + "\r\n";
  for (const Piece& piece : picture.pieces) {
    for (std::size_t i = piece.first; i < piece.last; ++i) {
      const auto at = static_cast<std::int64_t>(i);
      const std::string token = fmt::format("{},{},{},{}", at / r.seq_len, at % r.seq_len, r.tokens[i],
                                            report::csv_cell(piece.text));
      for (std::int64_t layer = 0; layer < r.blocks; ++layer) {
        const RoutedTokens* const router = of_layer(r.routed, layer);
        const ExpertTokens* const experts = of_layer(r.experts, layer);
        if (router == nullptr && experts == nullptr) continue;
        out += token + "," + cells(layer, router, experts, i) + "\r\n";
      }
    }
  }
  return out;
}

bool is_csv(std::string_view start) { return start.starts_with(kHead); }

std::string json(const Picture& picture) {
  const Routes& r = picture.routes;
  Json out = {{"checkpoint", picture.checkpoint},
              {"step", picture.step},
              {"rule", picture.rule},
              {"threshold", picture.threshold},
              {"capacity", picture.capacity ? Json(*picture.capacity) : Json(nullptr)},
              {"tokens", r.tokens.size()},
              {"first", picture.first},
              {"tokens_available", picture.available},
              {"seq_len", r.seq_len},
              {"sequences", r.sequences()},
              {"ids", r.tokens},
              {"depths", r.depths()},
              {"deepest", r.deepest()}};
  Json routed = Json::array(), experts = Json::array();
  for (const RoutedTokens& layer : r.routed) {
    const RouterFigures f = figures_of(layer, picture.threshold);
    Json positions = Json::array();
    for (std::size_t i = 0; i < layer.kept.size(); ++i)
      if (layer.kept[i] != 0) positions.push_back(i);
    Json j = {{"layer", f.layer},      {"kept", f.kept},      {"share", f.share},   {"router_above", f.above},
              {"router_mean", f.mean}, {"router_min", f.min}, {"router_max", f.max}};
    if (f.predicted_above) j["predictor_above"] = *f.predicted_above;
    j["kept_tokens"] = std::move(positions);
    routed.push_back(std::move(j));
  }
  for (const ExpertTokens& layer : r.experts) {
    const ExpertFigures f = figures_of(layer);
    Json j = {{"layer", f.layer},
              {"tokens", f.reached},
              {"load", f.load},
              {"experts_a_token", f.experts_a_token},
              {"without_expert", f.without_expert},
              {"noop_affinity", f.noop_affinity},
              {"noop_first", f.noop_first}};
    if (f.dropped) j["dropped"] = *f.dropped;
    if (f.noop_chosen) j["noop_chosen"] = *f.noop_chosen;
    experts.push_back(std::move(j));
  }
  out["routers"] = std::move(routed);
  out["experts"] = std::move(experts);
  return out.dump();
}

}  // namespace fathom::routes
