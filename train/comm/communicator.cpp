#include "train/comm/communicator.h"

#include <fmt/format.h>
#include <unistd.h>

#include "train/comm/host.h"
#include "train/comm/rank_error.h"

namespace fathom {

namespace {

class LoneCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string description() const override { return "1 rank"; }
  std::string where(int) const override { return fmt::format("{}, process {}", host_name(), ::getpid()); }
  int local_rank() const override { return 0; }
  int local_size() const override { return 1; }

  void all_reduce(View) override {}
  void reduce_scatter(View, std::span<const std::int64_t>) override {}
  void all_gather(View, std::span<const std::int64_t>) override {}
  void broadcast(View, int) override {}
  void finish() override {}

  void all_reduce_host(std::span<double>, Reduce) override {}
  void broadcast_host(std::span<std::byte>, int) override {}
  std::vector<std::string> gather(const std::string& mine) override { return {mine}; }
  void barrier() override {}

  void set_timeout(double) override {}
  void set_progress(std::int64_t) override {}
  bool fail(const std::string&) noexcept override { return false; }
};

}  // namespace

void Communicator::lose(const std::string& what) { throw RankError("Another rank is gone: " + what + "."); }

std::shared_ptr<Communicator> make_lone_communicator() { return std::make_shared<LoneCommunicator>(); }

double sum_over(Communicator& ranks, double value) {
  ranks.all_reduce_host(std::span(&value, 1), Communicator::Reduce::Sum);
  return value;
}

double max_over(Communicator& ranks, double value) {
  ranks.all_reduce_host(std::span(&value, 1), Communicator::Reduce::Max);
  return value;
}

std::string text_of_rank_0(Communicator& ranks, const std::string& text) {
  const auto size = value_of_rank_0(ranks, static_cast<std::uint64_t>(text.size()));
  std::string received = text;
  received.resize(size);
  if (size > 0) ranks.broadcast_host(std::as_writable_bytes(std::span(received)), 0);
  return received;
}

std::int64_t offset_of(std::span<const std::int64_t> counts, int rank) {
  std::int64_t sum = 0;
  for (int r = 0; r < rank; ++r) sum += counts[static_cast<std::size_t>(r)];
  return sum;
}

}  // namespace fathom
