// Inputs of the op tables: random numbers and indices, each a function of its seed alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "tests/ops/op_table.h"

namespace fathom::op_test {

inline std::vector<double> normal(std::int64_t n, unsigned seed, double mean = 0, double stddev = 1) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> distribution(mean, stddev);
  std::vector<double> values(static_cast<std::size_t>(n));
  for (double& x : values) x = distribution(generator);
  return values;
}

inline Operand real(const char* name, const Shape& shape, unsigned seed, double mean = 0, double stddev = 1) {
  return {name, shape, Element::Compute, [=] { return normal(shape.size(), seed, mean, stddev); }};
}

/// A matrix of parameters: its gradient is added up in the stat dtype.
inline Operand weight(const char* name, const Shape& shape, unsigned seed, double mean = 0,
                      double stddev = 1) {
  return {name, shape, Element::Weight, [=] { return normal(shape.size(), seed, mean, stddev); }};
}

inline Operand stat(const char* name, const Shape& shape, unsigned seed, double mean = 0, double stddev = 1) {
  return {name, shape, Element::Stat, [=] { return normal(shape.size(), seed, mean, stddev); }};
}

inline Operand index(const char* name, std::vector<double> values) {
  const auto n = static_cast<std::int64_t>(values.size());
  return {name, {n}, Element::Index, [values = std::move(values)] { return values; }};
}

/// n whole numbers below `limit`, repeats and all.
inline std::vector<double> ids(std::int64_t n, std::int64_t limit, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<std::int64_t> any(0, limit - 1);
  std::vector<double> values(static_cast<std::size_t>(n));
  for (double& x : values) x = static_cast<double>(any(generator));
  return values;
}

/// 0, 3, 4, 9, ...: positions with gaps, ascending.
inline std::vector<double> gaps(std::int64_t n) {
  std::vector<double> values;
  double at = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    values.push_back(at);
    at += static_cast<double>(1 + (i * i + 2) % 7);
  }
  return values;
}

/// `count` of `rows` rows, unique and ascending, unevenly spread.
inline std::vector<double> some_rows(std::int64_t rows, std::int64_t count) {
  std::vector<std::int64_t> all(static_cast<std::size_t>(rows));
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::int64_t>(i);
  std::shuffle(all.begin(), all.end(), std::mt19937(static_cast<unsigned>(rows + count)));
  all.resize(static_cast<std::size_t>(count));
  std::sort(all.begin(), all.end());
  return {all.begin(), all.end()};
}

}  // namespace fathom::op_test
