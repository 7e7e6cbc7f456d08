// Prints the training FLOPs a token of the config named on the command line, as fathom plan --json does.
#include <cstdio>

#include "src/config/parse.h"
#include "src/config/resolve.h"
#include "src/flops/flops.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const fathom::Config config = fathom::resolve(fathom::load_config(argv[1], {}), 4096);
  std::printf("\"flops_per_token_train\":%.1f\n", fathom::train_flops_per_token(config).total());
  return 0;
}
