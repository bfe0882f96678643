#!/usr/bin/env bash
# Resolves pyproject.toml into hashed locks, four a Python minor: core (py311.txt), core + dev (py311-dev.txt), core + store
# (py311-store.txt: PostgreSQL and S3 clients, which the image needs) and core + privacy (py311-privacy.txt: Opacus).
# torch and the CUDA packages it pulls in stay out: pip installs them first, as the CPU or the CUDA build, by what
# the machine has (see the Makefile), so that one lock serves both. Run as `make lock`; to upgrade, delete the files first.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
skip=()
for package in torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
  nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
  nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx; do
  skip+=(--no-emit-package "$package")
done
for minor in 11 12 13; do
  for extra in "" dev store privacy; do
    out=requirements/py3$minor${extra:+-$extra}.txt
    "$uv" pip compile pyproject.toml --python-version "3.$minor" --python-platform linux ${extra:+--extra $extra} \
      ${extra:+--constraint requirements/py3$minor.txt} ${CONSTRAINTS:+--constraint $CONSTRAINTS} --generate-hashes \
      --no-header --no-annotate --no-emit-index-url --no-emit-find-links "${skip[@]}" --quiet --output-file "$out"
    grep -E '^(nvidia|cuda|triton|torch)' "$out" && { echo "$out names a CUDA package: add it to the list in $0" >&2; exit 1; }
  done
  # Flower has no solution beside the core, so it gets an environment of its own (make federated).
  "$uv" pip compile requirements/federated.in --python-version "3.$minor" --python-platform linux --generate-hashes \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet --output-file requirements/py3$minor-federated.txt
  # MkDocs builds pages and imports nothing of ours: an environment of its own keeps its pins out of the core's.
  "$uv" pip compile requirements/docs.in --python-version "3.$minor" --python-platform linux --generate-hashes \
    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --quiet --output-file requirements/py3$minor-docs.txt
done
# The checks of the Helm chart (.ci/kubernetes) have one lock for all minors.
"$uv" pip compile requirements/kubernetes.in --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
  --no-emit-index-url --no-emit-find-links --quiet --output-file requirements/kubernetes.txt
echo "locks written: $(ls requirements/*.txt | wc -l)"
