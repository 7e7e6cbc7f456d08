// Where the chain of speculative decoding (chain.h) gets its chance from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace fathom {

/// What a random number decides.
enum class Purpose : std::uint8_t {
  Proposal,    // a token of the first level
  Acceptance,  // whether a level takes a proposal
  Token        // the token that a level chooses by itself behind those
};

/// Names one decision. No two of a text have the same name.
struct Decision {
  std::int64_t position = 0;  // of the token in the text
  Purpose purpose = Purpose::Proposal;
  std::int64_t level = 0;
  std::int64_t cycle = 0;  // how many passes of levels were before
};

class Chance {
 public:
  virtual ~Chance() = default;
  /// True with this probability, 0 to 1.
  virtual bool happens(double probability, const Decision& d) = 0;
  /// A place with a probability in proportion to its weight; they are not negative, and not all 0.
  virtual std::size_t pick(std::span<const double> weights, const Decision& d) = 0;
  /// The same where the weights lie elsewhere: the number of [0, 1) by which somebody else draws, the place
  /// being the one in which that part of all weights falls, these laid side by side. `weights` brings them
  /// for whoever has to see them.
  virtual double share(const std::function<std::vector<double>()>& weights, const Decision& d) = 0;
};

/// Numbers that are a pure function of (seed, position, purpose, cycle).
class SeededChance final : public Chance {
 public:
  explicit SeededChance(std::uint64_t seed) : seed_(seed) {}
  bool happens(double probability, const Decision& d) override;
  std::size_t pick(std::span<const double> weights, const Decision& d) override;
  double share(const std::function<std::vector<double>()>&, const Decision& d) override {
    return uniform_of(d);
  }

 private:
  double uniform_of(const Decision& d) const;
  std::uint64_t seed_;
};

/// The token that shared noise chooses from probabilities p: the greatest log p + g, with Gumbel numbers g of
/// (seed, position, token). Everybody who chooses by the same noise chooses the more alike, the more alike
/// their p are, and each of them draws from its own p.
std::int32_t gumbel_choice(std::span<const double> p, std::uint64_t seed, std::int64_t position);

}  // namespace fathom
