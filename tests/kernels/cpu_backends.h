// CPU backends of every instruction set that this machine has, and views of vectors.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/backend.h"
#include "kernels/error.h"

namespace fathom::testing_support {

/// Holds FATHOM_ISA while a backend is made.
class ChosenIsa {
 public:
  explicit ChosenIsa(const std::string& isa) {
    if (const char* old = std::getenv("FATHOM_ISA")) old_ = old;
    ::setenv("FATHOM_ISA", isa.c_str(), 1);
  }
  ~ChosenIsa() {
    if (old_.empty()) {
      ::unsetenv("FATHOM_ISA");
    } else {
      ::setenv("FATHOM_ISA", old_.c_str(), 1);
    }
  }
  ChosenIsa(const ChosenIsa&) = delete;
  ChosenIsa& operator=(const ChosenIsa&) = delete;

 private:
  std::string old_;
};

inline std::unique_ptr<Backend> backend_for(const std::string& isa, int threads, bool invariant) {
  const ChosenIsa chosen(isa);
  BackendOptions options;
  options.invariant = invariant;
  return make_cpu_backend(options, threads);
}

/// Those that this processor and this build have.
inline const std::vector<std::string>& isas() {
  static const std::vector<std::string> found = [] {
    std::vector<std::string> names;
    for (const char* isa : {"portable", "avx2", "avx512"}) {
      try {
        backend_for(isa, 1, false);
        names.emplace_back(isa);
      } catch (const UserError&) {
        continue;  // not here: the point of asking
      }
    }
    return names;
  }();
  return found;
}

template <typename T>
View view(std::vector<T>& v) {
  return {v.data(), static_cast<std::int64_t>(v.size()), dtype_of<T>::value};
}
template <typename T>
ConstView view(const std::vector<T>& v) {
  return {v.data(), static_cast<std::int64_t>(v.size()), dtype_of<T>::value};
}

template <typename T>
std::vector<T> normal(std::int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> distribution;
  std::vector<T> v(static_cast<std::size_t>(n));
  for (T& x : v) x = static_cast<T>(distribution(generator));
  return v;
}

template <typename T>
bool same_bits(const T* a, const T* b, std::size_t n) {
  return std::memcmp(a, b, n * sizeof(T)) == 0;
}

template <typename Call>
void expect_internal_error(Call&& call, std::initializer_list<std::string> words) {
  try {
    call();
    ADD_FAILURE() << "no error";
  } catch (const InternalError& e) {
    for (const std::string& word : words) {
      EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what() << " lacks " << word;
    }
  }
}

}  // namespace fathom::testing_support
