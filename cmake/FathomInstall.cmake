# install rules: see FathomInstall
