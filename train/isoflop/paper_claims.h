// The paper's claims (Raposo et al. 2024), one by one: our figure, its interval, and whether it held here.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "train/isoflop/fit.h"

namespace fathom::isoflop {

enum class Verdict { Held, NotHeld, NotTestable };
const char* name_of(Verdict verdict);  // "held", "not held", "not testable here"

/// A claim about one family. It held when its figure's whole interval is on the claim's side, and did not
/// when the whole interval is on the other side; in between this sweep cannot tell, and `why` says what it
/// lacks.
struct PaperClaim {
  std::string id;      // "lower_loss"
  std::string family;  // whose claim it is
  std::string claim;   // the paper's, in a sentence
  std::string figure;  // ours, in words, with units
  Estimate estimate;   // of the figure; value is NaN when there is none
  Verdict verdict = Verdict::NotTestable;
  std::string why;
};

/// Every claim, for every family that it is about. Families are compared with the first dense one, at the
/// largest budget at which both minima are usable.
std::vector<PaperClaim> test_claims(const Fit& fit, std::span<const Row> rows);

std::string claims_text(std::span<const PaperClaim> claims);
std::string claims_json(std::span<const PaperClaim> claims);

}  // namespace fathom::isoflop
