# syntax=docker/dockerfile:1
# One image for every service: with an index of CPU wheels a small one, without any (on Linux) one with
# the CUDA build of torch. TORCH_INDEX names an index of wheels (pytorch.org, "Get Started", has them).
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/atlas
ENV PATH=/opt/atlas/bin:$PATH
# Alone in its layer: it is by far the largest and changes least.
RUN pip install "torch==${TORCH_VERSION}" ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"}
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY migrations ./migrations
COPY workers ./workers
COPY app ./app
COPY atlas ./atlas
RUN pip install ".[hub]"

FROM python:${PYTHON_VERSION}-slim AS runtime
RUN groupadd --gid 10001 atlas \
    && useradd --uid 10001 --gid atlas --create-home atlas \
    && install --directory --owner=atlas --group=atlas /data
COPY --from=build /opt/atlas /opt/atlas
ENV PATH=/opt/atlas/bin:$PATH \
    ATLAS_HOME=/data \
    PYTHONUNBUFFERED=1
USER atlas
WORKDIR /home/atlas
VOLUME /data
EXPOSE 8501
CMD ["atlas", "--help"]
