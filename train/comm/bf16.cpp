#include "train/comm/bf16.h"

#include <bit>
#include <cmath>
#include <cstdint>

namespace fathom {

void to_fp32(std::span<float> to, ConstView from) {
  const auto* bits = static_cast<const std::uint16_t*>(from.data);
  for (std::size_t i = 0; i < to.size(); ++i) to[i] = std::bit_cast<float>(std::uint32_t{bits[i]} << 16);
}

void to_bf16(View to, std::span<const float> from) {
  auto* bits = static_cast<std::uint16_t*>(to.data);
  for (std::size_t i = 0; i < from.size(); ++i) {
    const auto x = std::bit_cast<std::uint32_t>(from[i]);
    constexpr std::uint32_t kQuiet = 0x40;
    bits[i] = std::isnan(from[i]) ? static_cast<std::uint16_t>(x >> 16 | kQuiet)
                                  : static_cast<std::uint16_t>((x + 0x7fff + (x >> 16 & 1)) >> 16);
  }
}

}  // namespace fathom
