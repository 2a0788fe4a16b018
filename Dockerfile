# syntax=docker/dockerfile:1
# One image for every service, in two kinds: --target cpu needs TORCH_INDEX, an index of CPU wheels (pytorch.org
# names it under "Get Started"); --target cuda takes the wheels that PyPI has for Linux, which bring CUDA.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/atlas
ENV PATH=/opt/atlas/bin:$PATH
ARG TORCH_VERSION=2.13.0
WORKDIR /src

# torch is alone in its layer: it is by far the largest and changes least.
FROM build AS torch-cpu
ARG TORCH_INDEX
RUN test -n "${TORCH_INDEX}" && pip install "torch==${TORCH_VERSION}" --index-url "${TORCH_INDEX}"

FROM build AS torch-cuda
RUN pip install "torch==${TORCH_VERSION}"

# The same versions as were tested together, and the same files, on top of either.
FROM torch-cpu AS install-cpu
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY migrations ./migrations
COPY workers ./workers
COPY app ./app
COPY atlas ./atlas
RUN pip install --constraint constraints.txt ".[hub,oidc,s3]"

FROM torch-cuda AS install-cuda
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY migrations ./migrations
COPY workers ./workers
COPY app ./app
COPY atlas ./atlas
RUN pip install --constraint constraints.txt ".[hub,oidc,s3]"

FROM python:${PYTHON_VERSION}-slim AS runtime
RUN groupadd --gid 10001 atlas \
    && useradd --no-log-init --uid 10001 --gid atlas --create-home atlas \
    && install --directory --owner=atlas --group=atlas /data
ENV PATH=/opt/atlas/bin:$PATH \
    ATLAS_HOME=/data \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/atlas
VOLUME /data
EXPOSE 8501 9101
CMD ["atlas", "--help"]

FROM runtime AS cuda
COPY --from=install-cuda /opt/atlas /opt/atlas

FROM runtime AS cpu
COPY --from=install-cpu /opt/atlas /opt/atlas
