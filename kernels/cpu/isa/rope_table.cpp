#include "kernels/cpu/isa/rope_table.h"

#include <math.h>

#include "kernels/cpu/host.h"
#include "kernels/cpu/isa/parallel.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

/// In float the exponent, the frequency and the angle are rounded as a float implementation rounds them, so
/// that models trained elsewhere see the same angles; only the cosine itself is computed in double.
double angle(std::int64_t position, double frequency, float) {
  return static_cast<double>(static_cast<float>(position) * static_cast<float>(frequency));
}
double angle(std::int64_t position, double frequency, double) {
  return static_cast<double>(position) * frequency;
}

}  // namespace

template <typename T>
RopeTable<T>::~RopeTable() {
  release(cosines_);
}

template <typename T>
void RopeTable<T>::prepare(std::int64_t positions, std::int64_t head_dim, double theta,
                           const RopeScaling& scaling) {
  const std::int64_t half = head_dim / 2;
  if (positions <= positions_ && half == half_ && theta == theta_ && scaling == scaling_) return;
  std::int64_t room = 256;
  while (room < positions) room *= 2;
  T* block = static_cast<T*>(allocate(static_cast<std::size_t>(2 * room * half) * sizeof(T)));
  release(cosines_);
  cosines_ = block;
  sines_ = block + room * half;
  positions_ = room;
  half_ = half;
  theta_ = theta;
  scaling_ = scaling;
  parallel_for(half, 1, [=, this](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T exponent = static_cast<T>(-2 * i) / static_cast<T>(2 * half);
      const double frequency = scaled_frequency(::pow(theta, static_cast<double>(exponent)), scaling);
      for (std::int64_t t = 0; t < room; ++t) {
        const double a = angle(t, frequency, T{});
        cosines_[t * half + i] = static_cast<T>(::cos(a));
        sines_[t * half + i] = static_cast<T>(::sin(a));
      }
    }
  });
}

template class RopeTable<float>;
template class RopeTable<double>;

}  // namespace fathom::cpu::FATHOM_ISA
