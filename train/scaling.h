// What training by several GPUs will take, foretold: computation from a speed measured on one, communication
// from the bytes that the collectives of train/shards.h move and the links' rates. An estimate for a choice
// of cluster, not a measurement.
#pragma once

#include <cstdint>
#include <string>

#include "src/config/config.h"
#include "src/flops/flops.h"

namespace fathom {

/// A way from one GPU to the next, of which each has its own.
struct Link {
  std::string name;
  double bytes_per_second = 0;  // in one direction, as collectives reach it
  double latency = 0;           // seconds a message takes beside its bytes
};

/// "nvlink", "pcie", "infiniband", "ethernet": nominal rates of NVLink 4 (450 GB/s), PCIe 5 x16 (64), NDR 400
/// Gb/s (50) and 100 Gb/s (12.5), of which four fifths are counted; or GB/s as measured, such as "310".
/// UsageError: anything else.
Link link_of(const std::string& text);

struct Cluster {
  Link within;                  // a host
  Link between;                 // hosts
  int gpus_per_host = 8;        // a ring of more goes at its slowest link's rate
  double flops_per_second = 0;  // of one GPU, of a training's model FLOPs
};

/// A step as one of `gpus` sees it. Seconds:
///   compute  its share's model FLOPs at the cluster's speed
///   reduce   a ring's reduce-scatter of all gradients, in buckets: (n-1)/n of their bytes, and n-1 messages
///   a bucket hidden   of it behind backward of the last micro-batch (two thirds of its computation); the
///   last bucket waits for all of it gather   a ring's all-gather of the weights that forward reads, which
///   nothing hides step     compute + reduce - hidden + gather
struct ScaledStep {
  int gpus = 1;
  std::int64_t tokens = 0;  // of all, a step
  double compute = 0, reduce = 0, hidden = 0, gather = 0;
  double bytes_sent = 0;  // by each GPU
  MemoryEstimate memory;  // of each
  double step() const { return compute + reduce - hidden + gather; }
  double tokens_per_second() const { return static_cast<double>(tokens) / step(); }
  /// Of the time of a GPU alone with the same share, without communication.
  double efficiency() const { return compute / step(); }
};

/// `config` resolved. UsageError: its step cannot be shared among so many (share_of()).
ScaledStep scaled_step(const Config& config, const Cluster& cluster, int gpus);

}  // namespace fathom
