// The op table on the GPU: every entry, and larger ones, in fp32 and bf16 against the CPU in fp64; and, when
// the backend is deterministic, the same bits twice.
#include "tests/ops/op_table.h"

#include <set>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/devices.h"

namespace fathom::op_test {
namespace {

using testing_support::Device;
using testing_support::open_device;

// All entries of one op: a test each would start CUDA hundreds of times.
struct Subject {
  std::string op;
  DType dtype;
  friend void PrintTo(const Subject& s, std::ostream* out) {
    *out << s.op << ", " << fathom::name_of(s.dtype);
  }
};

// Of bf16: half of the last of 8 bits is 2e-3, and a result is rounded a few times on its way. Relative to
// the largest element.
double bf16_tolerance(const OpCase& of) {
  if (of.op == "linear_cross_entropy") return 3e-2;  // logits are rounded before the exponential
  if (of.op == "attention") return 2e-2;             // probabilities and their gradients are rounded
  return 1e-2;
}

class CudaOpTable : public testing_support::OnCuda<::testing::TestWithParam<Subject>> {
 protected:
  std::vector<OpCase> entries() const {
    std::vector<OpCase> all;
    for (const std::vector<OpCase>& table : {op_table(), large_op_table()}) {
      for (const OpCase& of : table) {
        if (of.op != GetParam().op) continue;
        all.push_back(in_bf16() ? rounded_to_bf16(of) : of);
      }
    }
    return all;
  }

  bool in_bf16() const { return GetParam().dtype == DType::BF16; }
  double tolerance(const OpCase& of) const { return in_bf16() ? bf16_tolerance(of) : of.tolerance; }

  void expect_close(const Evaluation& ours, const Evaluation& exact, const OpCase& of) {
    ASSERT_EQ(ours.outputs.size(), exact.outputs.size());
    ASSERT_EQ(ours.gradients.size(), exact.gradients.size());
    const auto agree = [&](const std::vector<double>& a, const std::vector<double>& b,
                           const std::string& what) {
      const double difference = relative_difference(a, b);
      EXPECT_LT(difference, tolerance(of)) << what;
      if (difference > worst_) worst_ = difference, worst_name_ = of.name() + ", " + what;
    };
    for (std::size_t i = 0; i < ours.outputs.size(); ++i) {
      agree(ours.outputs[i], exact.outputs[i], fmt::format("output {}", i));
    }
    for (std::size_t i = 0; i < ours.gradients.size(); ++i) {
      agree(ours.gradients[i], exact.gradients[i], "gradient of " + of.operands[i].name);
    }
  }

  void TearDown() override {
    if (!worst_name_.empty()) fmt::print("worst relative difference {:.2e}: {}\n", worst_, worst_name_);
  }

 private:
  double worst_ = 0;
  std::string worst_name_;
};

TEST_P(CudaOpTable, IsCloseToTheCpuInDouble) {
  Context gpu(shared_cuda(), GetParam().dtype);
  Context cpu(open_device(Device::Cpu).backend, DType::F64);
  for (const OpCase& of : entries()) {
    SCOPED_TRACE(of.name());
    expect_close(evaluate(gpu, of, Wanted::All), evaluate(cpu, of, Wanted::All), of);
  }
}

// The deterministic backend may choose other kernels, so they are compared as well.
TEST_P(CudaOpTable, DeterministicIsTheSameBitsTwiceAndCloseToo) {
  Context gpu(open_device(Device::Cuda, {.deterministic = true}).backend, GetParam().dtype);
  Context cpu(open_device(Device::Cpu).backend, DType::F64);
  for (const OpCase& of : entries()) {
    SCOPED_TRACE(of.name());
    const Evaluation once = evaluate(gpu, of, Wanted::All);
    const Evaluation twice = evaluate(gpu, of, Wanted::All);
    EXPECT_EQ(once.outputs, twice.outputs);
    EXPECT_EQ(once.gradients, twice.gradients);
    expect_close(once, evaluate(cpu, of, Wanted::All), of);
  }
}

std::vector<Subject> subjects() {
  std::set<std::string> ops;
  for (const OpCase& of : op_table()) ops.insert(of.op);
  std::vector<Subject> all;
  for (const std::string& op : ops) {
    for (const DType dtype : {DType::F32, DType::BF16}) all.push_back({op, dtype});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Ops, CudaOpTable, ::testing::ValuesIn(subjects()),
                         [](const auto& p) { return p.param.op + "_" + fathom::name_of(p.param.dtype); });

}  // namespace
}  // namespace fathom::op_test
