// Ranks whose collectives on the backend's memory are their devices' own (DeviceTransport), and who meet,
// talk on the host and watch over each other by another communicator.
//
// A collective of devices ends when all have come to it, or never: so whatever waits for a device looks after
// the others meanwhile, and has the transport abort what it waits for when one of them is lost.
#pragma once

#include <memory>

#include "train/comm/communicator.h"
#include "train/comm/device_transport.h"

namespace fathom {

std::shared_ptr<Communicator> make_device_communicator(std::shared_ptr<Communicator> host,
                                                       std::unique_ptr<DeviceTransport> transport);

}  // namespace fathom
