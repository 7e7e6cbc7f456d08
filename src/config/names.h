// The names of the configuration's enumerations, as YAML, logs and checkpoints write them.
#pragma once

#include <array>
#include <cstddef>

#include "src/config/config.h"

namespace fathom {

/// EnumNames<E>::values[i] is the name of the enumerator whose value is i.
template <typename E>
struct EnumNames;

template <>
struct EnumNames<RopeScalingKind> {
  static constexpr std::array values{"none", "linear", "llama3"};
};
template <>
struct EnumNames<RoutingKind> {
  static constexpr std::array values{"none", "mod", "moe", "mode_staged", "mode_integrated"};
};
template <>
struct EnumNames<ExpertsChoose> {
  static constexpr std::array values{"expert", "token"};
};
template <>
struct EnumNames<Selection> {
  static constexpr std::array values{"topk", "stochastic"};
};
template <>
struct EnumNames<Gate> {
  static constexpr std::array values{"raw", "sigmoid", "tanh"};
};
template <>
struct EnumNames<CausalMethod> {
  static constexpr std::array values{"auto", "none", "aux", "predictor", "both"};
};
template <>
struct EnumNames<Schedule> {
  static constexpr std::array values{"cosine", "wsd", "constant"};
};
template <>
struct EnumNames<Recompute> {
  static constexpr std::array values{"none", "block"};
};
template <>
struct EnumNames<OnSpike> {
  static constexpr std::array values{"stop", "skip", "warn"};
};

template <typename E>
concept NamedEnum = requires {
  EnumNames<E>::values;
};

constexpr const char* name_of(NamedEnum auto e) {
  return EnumNames<decltype(e)>::values[static_cast<std::size_t>(e)];
}

}  // namespace fathom
