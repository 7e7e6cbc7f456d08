// Which rank owns which part of the parameters' arenas: stage 1 of ZeRO (Rajbhandari et al. 2020, arXiv
// 1910.02054). A rank has Adam's moments of its parts alone, and updates those.
//
//   gradients   reduce_scatter     every rank has the sums of its own parts
//   update      of a rank's parts  with the norm over all of them
//   weights     all_gather         every rank has all of them again
//
// The arenas are cut into buckets, none of which spans two groups of parameters, and each bucket into a part
// a rank. One rank owns all, in one part a group.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/nn/parameters.h"
#include "train/comm/communicator.h"

namespace fathom {

/// Elements of a bucket: 32 MiB of fp32, large enough for a network's full rate and small enough that the
/// first is on its way long before the last gradient is there.
inline constexpr std::int64_t kBucketElements = std::int64_t{1} << 23;

class Shards {
 public:
  struct Bucket {
    ParameterGroup group = ParameterGroup::Decayed;
    ArenaRange range;                  // of the arenas
    std::vector<std::int64_t> counts;  // of it, by rank
    ArenaRange own;                    // of the arenas: this rank's part
    std::int64_t moments = 0;          // where that part's moments begin
  };

  /// One rank.
  explicit Shards(const ParameterSet& parameters);
  Shards(const ParameterSet& parameters, int rank, int ranks, std::int64_t bucket_elements = kBucketElements);

  /// In the order of the arenas.
  const std::vector<Bucket>& buckets() const { return buckets_; }
  bool has_all() const { return ranks_ == 1; }
  /// Elements that this rank owns: its moments.
  std::int64_t owned() const { return owned_; }
  /// Of the arenas.
  std::int64_t elements() const { return elements_; }

 private:
  int ranks_ = 1;
  std::int64_t owned_ = 0;
  std::int64_t elements_ = 0;
  std::vector<Bucket> buckets_;
};

/// The reduction of a step's gradients, which begins with the buckets that backward is through with. Behind
/// finish() the gradients of a rank's own parts are sums over the ranks, and those of the others' parts are
/// undefined.
///
/// Sent as bf16, a rank's share of a gradient is rounded before it is sent, and the sum once more
/// (Communicator::reduce_scatter); the gradient itself is fp32 again.
class GradientReduction {
 public:
  /// Of the last micro-batch of a step. All arguments must outlive it. `sent`: an arena like the gradients',
  /// of bf16, in which they are sent; undefined: they are sent as they are.
  GradientReduction(Context& c, Communicator& ranks, const ParameterSet& parameters, const Shards& shards,
                    const Tensor& sent = {});

  /// Backward is through with this layer (Tape::LayerDone), and so with all behind it.
  void layer_done(const std::string& layer);
  /// Backward is through.
  void finish();
  /// That layer_done() took.
  double seconds() const { return seconds_; }

 private:
  void begin(const Shards::Bucket& bucket);

  Context& context_;
  Communicator& ranks_;
  const ParameterSet& parameters_;
  const Shards& shards_;
  const Tensor sent_;
  std::map<std::string, std::int64_t> begins_;  // of a layer's matrices in the arenas
  std::size_t left_ = 0;                        // buckets of matrices that have not begun, the first ones
  double seconds_ = 0;
};

/// After an update: what the forward pass reads comes to all ranks. Masters of matrices that have a working
/// copy stay where they are owned.
void gather_weights(Communicator& ranks, const ParameterSet& parameters, const Shards& shards);
/// All masters, for a checkpoint.
void gather_masters(Communicator& ranks, const ParameterSet& parameters, const Shards& shards);
/// Rank 0's masters, on every rank, with their working copy.
void spread_masters(Communicator& ranks, Context& c, ParameterSet& parameters);

/// One of Adam's moments, `owned` of which each rank has a part, whole into `all`, an arena.
void gather_moment(Communicator& ranks, Context& c, const Tensor& owned, const Tensor& all,
                   const Shards& shards);
/// Rank 0's `all`, in parts: each rank's into `owned`. What `all` holds of the other ranks is lost.
void spread_moment(Communicator& ranks, Context& c, const Tensor& all, const Tensor& owned,
                   const Shards& shards);

}  // namespace fathom
