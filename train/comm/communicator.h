// The ranks of one training, and what they tell each other.
//
// A rank is a process; rank 0 writes and speaks for all. Every collective is called by all ranks, in the same
// order and with the same sizes: which one comes next may depend only on what all of them know alike.
//
// Collectives on the backend's memory stand in the order of the backend's stream: they read what was computed
// before them, and what is computed after finish() reads what they wrote. Between the call and finish() they
// may be under way beside the backend's own work, so nobody touches their memory. Those on the host's memory
// wait.
//
// Errors: RankError (rank_error.h) when another rank is gone, failed, or has not come within the time-out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/dtype.h"

namespace fathom {

/// How long a rank may be silent, in seconds.
inline constexpr double kRankTimeout = 120;
/// One that answers, and does not come to where the others wait for it, has so many times as long.
inline constexpr double kRankPatience = 10;

class Communicator {
 public:
  Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  bool alone() const { return size() == 1; }
  /// "2 ranks by MPI (Open MPI 4.1.4)"; for people.
  virtual std::string description() const = 0;
  /// Of a rank: "host, process 4711".
  virtual std::string where(int rank) const = 0;
  /// This rank's number among those of its host, and how many those are.
  virtual int local_rank() const = 0;
  virtual int local_size() const = 0;

  // --- on the backend's memory
  /// values = the sum over the ranks, the same bits on each. fp32, fp64; bf16 is added up in fp32 and rounded
  /// once on the CPU, and rounded after each rank's share between devices.
  virtual void all_reduce(View values) = 0;
  /// Rank r has `counts[r]` elements of `values`, behind those of the ranks before it. The caller's own
  /// become the sum over the ranks; what the others' are is undefined afterwards.
  virtual void reduce_scatter(View values, std::span<const std::int64_t> counts) = 0;
  /// Each rank's part, laid out likewise, comes to all of them.
  virtual void all_gather(View values, std::span<const std::int64_t> counts) = 0;
  virtual void broadcast(View values, int root) = 0;
  /// Behind it the backend's stream waits for all of the above.
  virtual void finish() = 0;

  // --- on the host's memory
  enum class Reduce : std::uint8_t { Sum, Max };
  virtual void all_reduce_host(std::span<double> values, Reduce how) = 0;
  virtual void broadcast_host(std::span<std::byte> bytes, int root) = 0;
  /// Every rank's text, on every rank.
  virtual std::vector<std::string> gather(const std::string& mine) = 0;
  virtual void barrier() = 0;

  // --- trouble
  /// A rank that says nothing for so long is given up; one that answers, and still does not come to where the
  /// others wait for it, after kRankPatience times as long.
  virtual void set_timeout(double seconds) = 0;
  /// How far this rank is, in words, for whoever reports its loss: "step 12".
  virtual void set_progress(std::int64_t step) = 0;
  /// Tells the others why this rank ends. Returns whether another one will tell the user.
  virtual bool fail(const std::string& why) noexcept = 0;

  // --- for one that wraps this one, and has collectives of its own
  /// The rank comes to a collective, which all come to, and has left it.
  virtual void enter() {}
  virtual void leave() noexcept {}
  /// To be called while the rank waits for others. RankError: one of them is lost.
  virtual void check() {}
  /// Others seem to be gone, and it is not known which. Throws RankError: what was found of them, or else
  /// this.
  [[noreturn]] virtual void lose(const std::string& what);
};

/// One process: every sum is its own number.
std::shared_ptr<Communicator> make_lone_communicator();

/// The sum of one number; the largest one.
double sum_over(Communicator& ranks, double value);
double max_over(Communicator& ranks, double value);
/// Rank 0's text, on every rank.
std::string text_of_rank_0(Communicator& ranks, const std::string& text);
/// Rank 0's value of a type that is its bytes.
template <typename T>
T value_of_rank_0(Communicator& ranks, T value) {
  ranks.broadcast_host(std::as_writable_bytes(std::span(&value, 1)), 0);
  return value;
}

/// Elements before those of `rank`.
std::int64_t offset_of(std::span<const std::int64_t> counts, int rank);

}  // namespace fathom
