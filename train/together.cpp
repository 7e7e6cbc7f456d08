#include "train/together.h"

#include <optional>

namespace fathom {

namespace {

// What rank 0 tells the others of where the run begins.
struct Told {
  TrainingState state;
  bool borrowed = false;
  bool anew = false;
};

}  // namespace

Beginning begin_together(const RunFolder* folder, const ResumeRequest& request, const TrainingInputs& inputs,
                         const RankTrainee& trainee) {
  const auto& [ranks, c, model, optimizer] = trainee;
  if (ranks.alone()) return begin_run(*folder, request, inputs, {c, model, optimizer.state()});
  ParameterSet& parameters = model.parameters();
  Communicator& comm = ranks.comm();
  const Tensor& room = parameters.gradients();  // nothing is in them yet
  Beginning beginning;
  OptimizerState whole;
  if (folder != nullptr) {
    whole.m = c.zeros(room.shape(), room.dtype(), MemoryTag::Optimizer);
    whole.v = c.zeros(room.shape(), room.dtype(), MemoryTag::Optimizer);
    beginning = begin_run(*folder, request, inputs, {c, model, whole});
  }
  const Told told =
      value_of_rank_0(comm, Told{beginning.state, beginning.borrowed, beginning.checkpoint.empty()});
  beginning.state = told.state;
  beginning.borrowed = told.borrowed;
  spread_masters(comm, c, parameters);
  if (!told.anew) {  // else the moments are zeros
    const auto spread = [&](const Tensor& from, const Tensor& owned) {
      if (from.defined()) c.backend().copy(room, from);
      spread_moment(comm, c, room, owned, optimizer.shards());
    };
    spread(whole.m, optimizer.state().m);
    spread(whole.v, optimizer.state().v);
  }
  whole = {};
  c.allocator().release_cache();
  return beginning;
}

void save_together(const std::filesystem::path& path, const RankTrainee& trainee,
                   const CheckpointMeta& meta) {
  const auto& [ranks, c, model, optimizer] = trainee;
  const ParameterSet& parameters = model.parameters();
  if (ranks.alone()) {
    save_checkpoint(path, c, parameters, optimizer.state(), meta);
    return;
  }
  gather_masters(ranks.comm(), parameters, optimizer.shards());
  const Moments moments = [&, &o = optimizer](Moment moment) {
    const Tensor& owned = moment == Moment::First ? o.state().m : o.state().v;
    gather_moment(trainee.ranks.comm(), trainee.context, owned, parameters.gradients(), o.shards());
    return parameters.gradients();
  };
  if (ranks.leads()) {
    save_checkpoint(path, c, parameters, moments, meta);
  } else {
    moments(Moment::First);
    moments(Moment::Second);
  }
}

}  // namespace fathom
