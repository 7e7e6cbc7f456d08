// Collectives between the ranks' devices, by a library that can do nothing else: it does not know whether the
// others still live. DeviceCommunicator makes a communicator of it.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "kernels/dtype.h"

namespace fathom {

class DeviceTransport {
 public:
  DeviceTransport() = default;
  DeviceTransport(const DeviceTransport&) = delete;
  DeviceTransport& operator=(const DeviceTransport&) = delete;
  /// In order when all ranks come to it and nothing went wrong; else what is under way is aborted.
  virtual ~DeviceTransport() = default;

  /// "NCCL 2.28.9"; for people.
  virtual std::string description() const = 0;

  // --- Communicator's, on the backend's memory. RankError: the library says that another rank is gone.
  virtual void all_reduce(View values) = 0;
  virtual void reduce_scatter(View values, std::span<const std::int64_t> counts) = 0;
  virtual void all_gather(View values, std::span<const std::int64_t> counts) = 0;
  virtual void broadcast(View values, int root) = 0;
  virtual void finish() = 0;

  /// Called again and again while the host waits for the device, with the seconds that it has waited; what it
  /// throws ends the wait.
  virtual void set_while_waiting(std::function<void(double seconds)> look) = 0;
  /// What the library found meanwhile, in words; empty: nothing.
  virtual std::string trouble() = 0;
  /// What is under way ends as it is, and nothing can be begun any more. Waits for nobody.
  virtual void abort() noexcept = 0;
};

}  // namespace fathom
