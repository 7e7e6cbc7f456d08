// What the subcommands of fathom isoflop share: the sweep's file and folder.
#pragma once

#include <string>

#include <CLI/CLI.hpp>

#include "app/command.h"
#include "train/isoflop/sweep_folder.h"

namespace fathom::app {

struct SweepFlags {
  std::string sweep;
  std::string dir;

  /// The sweep, from its file or from the copy in its folder.
  isoflop::Sweep load() const;
  /// --dir, else the folder that was given as the sweep, else runs/NAME.
  isoflop::SweepFolder folder(const isoflop::Sweep& loaded) const;
};

/// Declares SWEEP and --dir on `sub`; `flags` must live as long as the command line.
void add_sweep_flags(CLI::App& sub, SweepFlags& flags);

/// The training store's size as the sweep's cells met it. UserError when none of them has run.
isoflop::DataSize known_size(const isoflop::Sweep& sweep, const isoflop::SweepFolder& folder);

void add_isoflop(CLI::App& app, Globals& globals);
void add_isoflop_run(CLI::App& isoflop, Globals& globals);
void add_isoflop_fit(CLI::App& isoflop, Globals& globals);
void add_isoflop_report(CLI::App& isoflop, Globals& globals);

}  // namespace fathom::app
