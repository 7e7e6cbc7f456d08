#include "tests/distributed/same_course.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <gtest/gtest.h>

namespace fathom::testing {

void expect_close(const Experiment& e, const std::string& a, const std::string& b, double tolerance) {
  std::vector<nlohmann::json> lines_a, lines_b;
  for (const std::string& line : computed(e, a)) lines_a.push_back(nlohmann::json::parse(line));
  for (const std::string& line : computed(e, b)) lines_b.push_back(nlohmann::json::parse(line));
  ASSERT_GE(lines_a.size(), lines_b.size());
  lines_a.erase(lines_a.begin(), lines_a.end() - static_cast<std::ptrdiff_t>(lines_b.size()));
  for (std::size_t i = 0; i < lines_b.size(); ++i) {
    const bool evaluation = !lines_b[i].contains("loss");
    ASSERT_EQ(lines_a[i].at("step"), lines_b[i].at("step"));
    for (const auto& [key, value] : lines_b[i].items()) {
      // What is measured on the last micro-batches is of other sequences.
      if (!value.is_number() || key.find("accuracy") != std::string::npos) continue;
      // Shares of few tokens, of which one more or less may be taken.
      const bool share = evaluation && (key.find("recall") != std::string::npos ||
                                        key.find("precision") != std::string::npos ||
                                        key.find("flops") != std::string::npos);
      const double x = lines_a[i].at(key), y = value;
      EXPECT_NEAR(x, y, (share ? 0.05 : tolerance) * std::max(1.0, std::abs(x)))
          << key << " of step " << lines_b[i].at("step");
      if (::testing::Test::HasFailure()) return;
    }
  }
}

}  // namespace fathom::testing
