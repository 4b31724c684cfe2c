# An engine process: services.decode or services.prefill, by the command. No UCX: its sidecar has that.
# Build from the repository's root: docker build -f compose/worker.Dockerfile .
FROM python:3.11-slim AS build
# For the CPU kernels; the image that runs has no compiler.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src

# Dependencies change rarely and take minutes: a layer of their own, from a project with nothing in it.
COPY pyproject.toml constraints.txt ./
RUN mkdir kernels protos services shared && touch README.md LICENSE \
 && for package in kernels protos services shared; do touch $package/__init__.py; done \
 && pip install --constraint constraints.txt ".[engine]"

COPY . .
RUN pip install --no-deps --force-reinstall .
# For every instruction set: which one a machine has is known only when the image runs. From / so that what is installed
# is meant, not /src.
RUN cd / && python -m kernels.cpu.prebuild

FROM python:3.11-slim
# The same number in all images: worker and sidecar share memory and sockets that only their user may open.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin tandem \
 && install -d -o tandem -g tandem /home/tandem/.cache /home/tandem/.cache/huggingface
COPY --from=build /opt/tandem /opt/tandem
# OpenMP's threads must not spin: the sidecar and the other workers need the cores.
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=passive
USER tandem
WORKDIR /home/tandem
# Compose and Kubernetes choose the role.
CMD ["python", "-m", "services.decode"]
