# The sidecar of a worker: UCX. No torch.
# Build from the repository's root: docker build -f compose/kv_transfer.Dockerfile .
FROM python:3.11-slim AS build
RUN python -m venv /opt/tandem
ENV PATH=/opt/tandem/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src

# Dependencies change rarely and take minutes: a layer of their own, from a project with nothing in it.
COPY pyproject.toml constraints.txt ./
RUN mkdir kernels protos services shared && touch README.md LICENSE \
 && for package in kernels protos services shared; do touch $package/__init__.py; done \
 && pip install --constraint constraints.txt ".[transfer]"

COPY . .
RUN pip install --no-deps --force-reinstall .

FROM python:3.11-slim
# The same number in all images: worker and sidecar share memory and sockets that only their user may open.
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin tandem
COPY --from=build /opt/tandem /opt/tandem
# A volume mounted here belongs to that user, too.
RUN install -d -o tandem -m 0700 /var/lib/tandem
ENV PATH=/opt/tandem/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER tandem
WORKDIR /home/tandem
CMD ["python", "-m", "services.kv_transfer"]
