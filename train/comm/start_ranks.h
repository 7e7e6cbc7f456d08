// Several processes of this program on this host, started by itself: for who has no mpirun.
#pragma once

#include <functional>

namespace fathom {

/// Starts this program again `ranks` times, with the same arguments, as ranks that meet by TCP
/// (Launcher::Own), and waits for all of them. To whoever watches they are one program: a signal that asks to
/// stop (SIGTERM, SIGINT, SIGHUP, SIGQUIT), or a terminal's to stop or continue this process, reaches each of
/// them once; where this process is killed, they end in order; where one fails, and the others do not end
/// with it, they are killed. SIGSTOP nobody can wait for: it stops this process alone, and the ranks go on.
///
/// Returns their exit status: 0, or that of the first rank that ended with another one, which has told why or
/// let another rank tell; 128 + signal where they died of a signal that was passed on to them. UserError: a
/// rank was killed and nobody was left to tell, or the system starts no more processes. To be called before
/// this process has threads.
///
/// `first` is called before, and what it throws is thrown: threads that it leaves behind, such as a driver's,
/// leave alone the signals that this process waits for.
int start_ranks(int ranks, const std::function<void()>& first);

}  // namespace fathom
