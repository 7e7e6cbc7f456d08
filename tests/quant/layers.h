// Random weights, and inputs that are correlated as a layer's are, for the tests of quantizers.
#pragma once

#include <cmath>
#include <cstdint>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/cpu/host.h"
#include "kernels/error.h"

namespace fathom::quant_test {

struct Sizes {
  std::int64_t rows = 0, columns = 0;
  int bits = 4;
  std::int64_t group = 0;
  friend std::ostream& operator<<(std::ostream& out, const Sizes& s) {
    return out << s.rows << " x " << s.columns << ", " << s.bits << " bits, groups of " << s.group;
  }
};

inline std::int64_t between(std::mt19937_64& random, std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random);
}

inline Sizes random_sizes(std::mt19937_64& random) {
  Sizes s;
  s.bits = between(random, 0, 1) == 0 ? 4 : 8;
  s.rows = between(random, 1, 24);
  s.group = between(random, 4, 40);
  s.columns = s.group * between(random, 1, 5);
  if (between(random, 0, 2) == 0) s.group = 0;
  return s;
}

/// Normal numbers, each row of another size.
inline std::vector<float> random_weights(std::mt19937_64& random, const Sizes& s) {
  std::normal_distribution<double> normal;
  std::vector<float> w;
  for (std::int64_t r = 0; r < s.rows; ++r) {
    const double size = std::exp(normal(random));
    for (std::int64_t c = 0; c < s.columns; ++c) w.push_back(static_cast<float>(size * normal(random)));
  }
  return w;
}

/// [tokens][columns]: mixtures of a quarter as many independent numbers, with noise and a size a column.
inline std::vector<float> random_inputs(std::mt19937_64& random, std::int64_t tokens, std::int64_t columns) {
  std::normal_distribution<double> normal;
  const auto n = static_cast<std::size_t>(columns), factors = n / 4 + 1;
  std::vector<double> mixture(n * factors), size(n), factor(factors);
  for (double& v : mixture) v = normal(random);
  for (double& v : size) v = std::exp(0.5 * normal(random));
  std::vector<float> x;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (double& v : factor) v = normal(random);
    for (std::size_t c = 0; c < n; ++c) {
      double sum = 0.3 * normal(random);
      for (std::size_t f = 0; f < factors; ++f) sum += mixture[c * factors + f] * factor[f];
      x.push_back(static_cast<float>(size[c] * sum));
    }
  }
  return x;
}

/// Holds the number of threads of host loops.
class Threads {
 public:
  explicit Threads(int threads) : old_(cpu::threads()) { cpu::set_threads(threads); }
  ~Threads() { cpu::set_threads(old_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int old_;
};

template <typename E, typename Call>
void expect_error(Call&& call, const std::string& words) {
  try {
    call();
    ADD_FAILURE() << "no error; expected: " << words;
  } catch (const E& e) {
    EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what() << " lacks " << words;
  }
}

}  // namespace fathom::quant_test
