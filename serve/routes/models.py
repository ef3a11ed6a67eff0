"""`/v1/models`: the tiers."""

from fastapi import APIRouter, Depends

from serve import deps, schemas, tiers

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(deps.known_query)])


@router.get("", response_model=schemas.ModelsOut, responses=deps.refusals(400, 401, 403))
async def every(_: deps.Caller, service: deps.TheService) -> schemas.ModelsOut:
    """The tiers: steps, sizes, limits, version, evaluation, measured latency, price."""
    return schemas.ModelsOut(data=[tiers.describe(service, name) for name in service.catalogue.tiers])


@router.get("/{model:path}", response_model=schemas.ModelOut, responses=deps.refusals(400, 401, 403, 404))
async def one(model: str, _: deps.Caller, service: deps.TheService) -> schemas.ModelOut:
    """One tier, by its name or an alias."""
    return tiers.describe(service, service.catalogue.find(model).name)
